"""How one tensor of a state is held: dense, in half precision with a scale, or sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ewc.parameters.names import canonical_name
from hf_ewc.parameters.sharding import is_dtensor, local_shard, whole

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One tensor as `scale · values`, at every position or only at `indices`.

    Args:
        values: dense values of the tensor's shape, or with `indices` a vector of the kept values.
        shape: the shape of the whole tensor.
        scale: factor of the values, a power of two, so that multiplying by it is exact.
        indices: positions of the values in the flattened tensor, int32 or int64, ascending; all
            other entries are 0. None: dense.
    """

    values: Tensor
    shape: torch.Size
    scale: float = 1.0
    indices: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the values are computed in: float64 for float64, else float32."""
        return torch.promote_types(self.values.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the values and indices that this process holds."""
        held = [self.values] if self.indices is None else [self.values, self.indices]
        return sum(local_shard(tensor).nbytes for tensor in held)

    def kept(self) -> Tensor:
        """The values in `dtype`, scaled; shaped as `values`."""
        values = self.values.to(self.dtype)
        return values if self.scale == 1.0 else values * self.scale

    def dense(self) -> Tensor:
        """The whole tensor in `dtype`; the tensor itself where it is held so already."""
        if self.indices is None:
            return self.kept()
        flat = torch.zeros(self.shape.numel(), dtype=self.dtype, device=self.device)
        return flat.index_copy_(0, self.indices.long(), self.kept()).view(self.shape)

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same tensor on `device`."""
        indices = None if self.indices is None else self.indices.to(device)
        return PackedTensor(self.values.to(device), self.shape, self.scale, indices)

    def problems(self, at_least_zero: bool) -> list[str]:
        """What is wrong with the values, as phrases that follow the tensor's name."""
        values, size = local_shard(self.values), self.shape.numel()
        found = []
        if self.indices is None and self.values.shape != self.shape:
            found.append(f"is {list(self.values.shape)} where {list(self.shape)} was expected")
        if self.indices is not None and self.indices.shape != self.values.shape:
            found.append(f"has {values.numel()} values at {self.indices.numel()} positions")
        elif self.indices is not None and values.numel():
            first, last = (int(bound) for bound in self.indices.aminmax())
            if first < 0 or last >= size:
                found.append(f"has positions from {first} to {last} in a tensor of {size}")
        if not math.isfinite(self.scale) or self.scale <= 0:
            found.append(f"has the scale {self.scale}; it is finite and above 0")
        if values.numel():
            low, high = (bound.item() for bound in values.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                found.append("has values that are not finite")
            elif at_least_zero and low < 0:
                found.append(f"has a value of {low * self.scale:.3g}; it is nowhere below 0")
        return found

    def equal(self, other: PackedTensor) -> bool:
        """Whether both are the same tensor, bit for bit, held in the same way."""
        return (
            self.shape == other.shape
            and self.scale == other.scale
            and _identical(self.values, other.values)
            and _identical(self.indices, other.indices)
        )


class TensorMap(Mapping[str, Tensor]):
    """Tensors by name, read dense, in fp32 or better, and held as `PackedTensor`."""

    def __init__(self, packed: Mapping[str, PackedTensor]) -> None:
        self._packed = dict(packed)

    def packed(self, name: str) -> PackedTensor:
        """The tensor as it is held."""
        return self._packed[name]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._packed.values())

    @property
    def is_sharded(self) -> bool:
        """Whether some tensor is a DTensor."""
        return any(is_dtensor(tensor.values) for tensor in self._packed.values())

    def to(self, device: torch.device | str) -> TensorMap:
        return TensorMap({name: tensor.to(device) for name, tensor in self._packed.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._packed[name].dense()

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorMap):
            if not isinstance(other, Mapping):
                return NotImplemented
            return self.keys() == other.keys() and all(
                isinstance(other[name], Tensor) and torch.equal(tensor, other[name])
                for name, tensor in self.items()
            )
        return self._packed.keys() == other._packed.keys() and all(
            tensor.equal(other._packed[name]) for name, tensor in self._packed.items()
        )

    def __repr__(self) -> str:
        return f"TensorMap({len(self)} tensors, {self.nbytes} bytes)"


def _identical(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    one, other = local_shard(one), local_shard(other)
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def dense(values: Tensor) -> PackedTensor:
    """`values` as they are, not copied."""
    return PackedTensor(values, values.shape)


def cast_to(packed: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    """Values of at least 0 in `dtype`; in fp16 and bf16 with a scale, so that none becomes 0.

    The scale is a power of two that brings the largest value to [2¹⁴, 2¹⁵) in fp16, to [½, 1) in
    bf16. A positive value that would still round to 0, in fp16 one below 1e-12 of the largest, is
    held as the smallest positive number.
    """
    values = packed.kept()
    if dtype not in HALF_DTYPES or values.numel() == 0:
        return PackedTensor(values.to(dtype), packed.shape, 1.0, packed.indices)
    exponent = math.frexp(whole(values.max()).item())[1]
    if dtype == torch.float16:
        exponent -= 15
    # Within the normal range of fp32 both the scale and its inverse are exact.
    scale = 2.0 ** max(-120, min(120, exponent))
    smallest = torch.finfo(dtype).smallest_normal
    if dtype == torch.float16:
        smallest *= torch.finfo(dtype).eps
    scaled = values / scale
    scaled = torch.where(values > 0, scaled.clamp_min(smallest), scaled)
    return PackedTensor(scaled.to(dtype), packed.shape, scale, packed.indices)


def with_rows(packed: PackedTensor, grown: Tensor) -> PackedTensor:
    """`packed` with the further rows of `grown`; those of a sparse tensor are 0."""
    if packed.indices is not None:
        return PackedTensor(packed.values, grown.shape, packed.scale, packed.indices)
    values = whole(packed.values)
    rows = grown[values.shape[0] :].to(values.device) / packed.scale
    dtype = torch.promote_types(values.dtype, rows.dtype) if rows.any() else values.dtype
    values = torch.cat([values.to(dtype), rows.to(dtype)])
    return PackedTensor(values, grown.shape, packed.scale)


def largest(
    importance: Mapping[str, PackedTensor],
    anchor: Mapping[str, PackedTensor],
    fraction: float,
    dtype: torch.dtype,
) -> tuple[dict[str, PackedTensor], dict[str, PackedTensor]]:
    """The ⌈fraction · entries⌉ largest importances of all tensors together, and their anchors.

    Entries that are 0 are never kept; of equal ones at the limit, the first are. Each tensor is
    sparse, or dense with zeros where that takes less memory with an importance in `dtype`.

    Raises:
        ValueError: a tensor is a DTensor.
    """
    if TensorMap(importance).is_sharded:
        raise ValueError(
            "Entries of a state in DTensors cannot be selected; save and load the state first, "
            "or use keep_fraction=1.0."
        )
    values = {name: packed.dense().flatten() for name, packed in importance.items()}
    # The small tolerance keeps 0.07 · 100 = 7.000000000000001 from being 8.
    keep = math.ceil(fraction * sum(tensor.numel() for tensor in values.values()) - 1e-6)
    limit, ties = _limit([tensor.view(torch.int32) for tensor in values.values()], keep)
    kept_importance, kept_anchor = {}, {}
    for name, tensor in values.items():
        bits = tensor.view(torch.int32)
        equal = (bits == limit).nonzero().flatten()[:ties]
        ties -= equal.numel()
        indices = torch.cat([(bits > limit).nonzero().flatten(), equal]).sort().values
        kept_importance[name], kept_anchor[name] = _selected(
            tensor, anchor[name], indices, importance[name].shape, dtype
        )
    return kept_importance, kept_anchor


def _limit(bits: Sequence[Tensor], keep: int) -> tuple[int, int]:
    """The `keep`-th largest of all entries, and how many equal to it are among the `keep` largest.

    Floats of at least 0 are ordered as their bits are, so that bisection over the bits finds the
    limit exactly, in 31 passes and without a copy of all entries. At least the smallest positive.
    """

    def count(limit: int) -> int:
        return sum(int((tensor >= limit).sum()) for tensor in bits)

    low, high = 1, 2**31 - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) >= keep else (low, middle)
    return low, max(keep - count(low + 1), 0)


def _selected(
    importance: Tensor,
    anchor: PackedTensor,
    indices: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
) -> tuple[PackedTensor, PackedTensor]:
    index_dtype = torch.int32 if importance.numel() < 2**31 else torch.int64
    entry = dtype.itemsize + anchor.values.dtype.itemsize
    if indices.numel() * (index_dtype.itemsize + entry) >= importance.numel() * entry:
        kept = torch.zeros_like(importance).index_copy_(0, indices, importance[indices])
        anchors = anchor if anchor.indices is None else dense(anchor.dense())
        return dense(kept.view(shape)), anchors
    positions = indices.to(index_dtype)
    centers = anchor.dense().flatten()[indices].to(anchor.values.dtype)
    return (
        PackedTensor(importance[indices], shape, 1.0, positions),
        PackedTensor(centers, shape, 1.0, positions),
    )


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def as_map(tensors: Mapping[str, Tensor]) -> TensorMap:
    """`tensors` as what `__post_init__` has made of them."""
    if not isinstance(tensors, TensorMap):
        raise TypeError(f"Expected a TensorMap, got {type(tensors).__name__}.")
    return tensors


def held(kind: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> TensorMap:
    """`tensors` as a TensorMap: as it is, or copies in `dtype` (None: their own)."""
    if isinstance(tensors, TensorMap):
        return tensors
    held = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(
                f"The {kind} of {name!r} must be a floating-point tensor, got {value!r:.80}."
            )
        plain = canonical_name(name)
        if plain in held:
            raise ValueError(f"The {kind} holds {plain!r} twice, once under the name of a wrapper.")
        held[plain] = dense(copied(value).to(dtype or value.dtype))
    return TensorMap(held)


def state_dtype(dtype: torch.dtype | str) -> torch.dtype:
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(dtype).removeprefix("torch.")
    if name not in allowed:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(allowed)}.")
    return allowed[name]
