"""How one tensor of a state is held: dense, in 16 bits with a scale, in 8 with many, or sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_ewc.parameters.names import canonical_name
from hf_ewc.parameters.sharding import is_dtensor, local_part, with_local

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
# Entries of a tensor: no parameter has as many, and a few bytes of positions could claim them.
_LARGEST = 1 << 40


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One tensor as `scale · values`, at every position or only at `indices`.

    Args:
        values: dense values of the tensor's shape, or with `indices` a vector of the kept values.
        shape: the shape of the whole tensor.
        scale: factor of the values, a power of two, so that multiplying by it is exact.
        indices: positions of the values in the flattened tensor, int32 or int64, ascending; all
            other entries are 0. None: dense.
        exponents: int8, [shape[0], blocks of a row] or [blocks]: value i of block b stands for
            2^exponents[b] times itself. Only with 8-bit values, which are dense.
    """

    values: Tensor
    shape: torch.Size
    scale: float = 1.0
    indices: Tensor | None = None
    exponents: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the values are computed in: float64 for float64, else float32."""
        return torch.float64 if self.values.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold it, by the names of the fields."""
        held = {"values": self.values, "indices": self.indices, "exponents": self.exponents}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that this process holds."""
        return sum(local_part(tensor).nbytes for tensor in self.tensors.values())

    def kept(self) -> Tensor:
        """The values in `dtype`, scaled; shaped as `values`."""
        if self.exponents is not None:
            return with_local(_scaled(self.values, self.exponents), self.values)
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
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def problems(self, at_least_zero: bool) -> list[str]:
        """What is wrong with it, as phrases that follow the tensor's name."""
        found = self._form_problems()
        if not math.isfinite(self.scale) or self.scale <= 0:
            found.append(f"has the scale {self.scale}; it is finite and above 0")
        return found or self._value_problems(at_least_zero)

    def _form_problems(self) -> list[str]:
        is_8_bit = self.values.dtype == FLOAT8
        if self.values.dtype not in DTYPES and not is_8_bit:
            return [f"is of {self.values.dtype}, not of a floating-point dtype that is allowed"]
        if is_8_bit != (self.exponents is not None):
            return ["is in 8 bits without exponents, or has exponents and is not"]
        if self.indices is not None:
            return self._index_problems(self.indices)
        if self.values.shape != self.shape:
            return [f"is {list(self.values.shape)} where {list(self.shape)} was expected"]
        if self.exponents is None or _block(self.values, self.exponents):
            return []
        return [f"has exponents {list(self.exponents.shape)} of {self.exponents.dtype}"]

    def _index_problems(self, indices: Tensor) -> list[str]:
        size = math.prod(self.shape)
        if indices.dtype not in INDEX_DTYPES or indices.ndim != 1 or self.values.ndim != 1:
            return [f"has positions of {indices.dtype} and of {indices.ndim} axes, not integers"]
        if self.exponents is not None or size >= _LARGEST:
            return ["is sparse in 8 bits, or larger than any tensor"]
        if indices.shape != self.values.shape:
            return [f"has {self.values.numel()} values at {indices.numel()} positions"]
        if indices.numel() == 0:
            return []
        first, last = (int(bound) for bound in indices.aminmax())
        if first < 0 or last >= size:
            return [f"has positions from {first} to {last} in a tensor of {size}"]
        if bool((indices[1:] <= indices[:-1]).any()):
            return ["has positions that are not in ascending order, each once"]
        return []

    def _value_problems(self, at_least_zero: bool) -> list[str]:
        values = local_part(self.kept() if self.exponents is not None else self.values)
        if not values.numel():
            return []
        low, high = (bound.item() * self.scale for bound in values.aminmax())
        largest = torch.finfo(self.dtype).max
        if not (math.isfinite(low) and math.isfinite(high)) or max(-low, high) > largest:
            return ["has values that are not finite"]
        if at_least_zero and low < 0:
            return [f"has a value of {low:.3g}; it is nowhere below 0"]
        return []

    def equal(self, other: PackedTensor) -> bool:
        """Whether both are the same tensor, bit for bit, held in the same way."""
        mine, others = self.tensors, other.tensors
        return (
            self.shape == other.shape
            and self.scale == other.scale
            and mine.keys() == others.keys()
            and all(_identical(tensor, others[name]) for name, tensor in mine.items())
        )


class TensorMap(Mapping[str, Tensor]):
    """Tensors by name, held as `PackedTensor`, read as dense copies in fp32 or better."""

    def __init__(self, packed: Mapping[str, PackedTensor]) -> None:
        self._packed = dict(packed)

    @classmethod
    def of(cls, kind: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> TensorMap:
        """`tensors` as it is, or copies of them in `dtype` (None: their own); `kind` says what.

        Raises:
            TypeError: an entry is not a floating-point tensor.
            ValueError: two names are one without the parts that wrappers put in.
        """
        if isinstance(tensors, cls):
            return tensors
        held = {}
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(
                    f"The {kind} of {name!r} must be a floating-point tensor, got {value!r:.80}."
                )
            plain = canonical_name(name)
            if plain in held:
                raise ValueError(
                    f"The {kind} holds {plain!r} twice, once under the name of a wrapper."
                )
            held[plain] = dense(copied(value).to(dtype or value.dtype))
        return cls(held)

    def packed(self, name: str) -> PackedTensor:
        """The tensor as it is held; not to be changed."""
        return self._packed[name]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._packed.items()}

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
        held = self._packed[name]
        tensor = held.dense()
        return tensor.clone() if tensor is held.values else tensor

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


def dense(values: Tensor) -> PackedTensor:
    """`values` as they are, not copied."""
    return PackedTensor(values, values.shape)


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _scaled(values: Tensor, exponents: Tensor) -> Tensor:
    """This process's 8-bit values in fp32, flat, each times 2 to its block's exponent."""
    wide, own = local_part(values).float().reshape(-1), local_part(exponents).reshape(-1)
    if not wide.numel():
        return wide
    blocks = wide.view(own.numel(), -1)
    return blocks.mul_(torch.exp2(own.float()).unsqueeze(1)).view(-1)


def _block(values: Tensor, exponents: Tensor) -> int:
    """Values that share an exponent; 0 where the shapes do not fit."""
    rows = values.shape[:1] if values.ndim > 1 else torch.Size()
    fits = exponents.dtype == torch.int8 and exponents.shape[:-1] == rows and exponents.ndim > 0
    if not fits or not exponents.numel() or values.numel() % exponents.numel():
        return 0
    return values.numel() // exponents.numel()


def _identical(one: Tensor, other: Tensor) -> bool:
    one, other = local_part(one), local_part(other)
    if one.dtype != other.dtype:
        return False
    if one.dtype == FLOAT8:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one.cpu(), other.cpu())
