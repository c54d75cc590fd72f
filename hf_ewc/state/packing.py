"""A state in less memory: in 16 or 8 bits, or with its largest importances only, as sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_ewc.config.checked import share
from hf_ewc.parameters.sharding import local_part, whole, with_local
from hf_ewc.state.packed import FLOAT8, PackedTensor, TensorMap, dense

STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": FLOAT8,
}
SHARDED = (
    "Entries of a state in DTensors cannot be selected; save and load the state first, or use "
    "keep_fraction=1.0."
)
BLOCKS = (128, 64, 32, 16)
"""Values that share an exponent in 8 bits: the first of these that divides a row."""


def state_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype by its name, or itself.

    Raises:
        ValueError: it is none that an importance can be held in.
    """
    name = str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")
    if name not in STATE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(STATE_DTYPES)}.")
    return STATE_DTYPES[name]


def packed_into(
    importance: TensorMap, anchor: TensorMap, dtype: torch.dtype | str, keep_fraction: float
) -> tuple[TensorMap, TensorMap]:
    """The same importance and anchor in less memory; see `EWCState.pack`."""
    dtype = state_dtype(dtype)
    keep_fraction = share("keep_fraction", keep_fraction)
    largest = None
    if keep_fraction < 1.0:
        if importance.is_sharded:
            raise ValueError(SHARDED)
        largest = Largest(
            lambda: (importance.packed(n).dense().float() for n in importance), keep_fraction
        )
    importances, anchors = {}, {}
    for name in importance:
        strength, center = importance.packed(name), anchor.packed(name)
        if largest is not None:
            strength, center = largest.take(strength.dense().float(), center, dtype)
        importances[name], anchors[name] = cast_to(strength, dtype), center
    return TensorMap(importances), TensorMap(anchors)


def cast_to(packed: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    """An importance in `dtype`; in 16 bits with a scale, in 8 with an exponent for each block.

    The scale is a power of two that maps the largest value into [2¹⁴, 2¹⁵) in fp16, [½, 1) in bf16;
    each exponent maps the largest value of its block into [2⁷, 2⁸) (float8_e4m3fn, of which the
    largest is 448). A positive value that would still round to 0, in fp16 one below 1e-12 of the
    largest, in 8 bits one below 8e-6 of its block's, is held as the smallest positive number.
    Vectors and sparse tensors that no block divides are held in bf16 in place of 8 bits.
    """
    if packed.values.dtype == dtype == FLOAT8:
        return packed
    values = packed.kept()
    if dtype == FLOAT8:
        size = _block_size(packed)
        if size:
            return _in_blocks(values, packed.shape, size)
        dtype = torch.bfloat16
    if dtype == torch.float32 or values.numel() == 0:
        return PackedTensor(values.to(dtype), packed.shape, 1.0, packed.indices)
    exponent = math.frexp(whole(values.max()).item())[1]
    smallest = torch.finfo(dtype).smallest_normal
    if dtype == torch.float16:
        exponent -= 15
        smallest *= torch.finfo(dtype).eps
    # Within the normal range of fp32 both the scale and its inverse are exact.
    scale = 2.0 ** max(-120, min(120, exponent))
    scaled = values / scale
    scaled = torch.where(values > 0, scaled.clamp_min(smallest), scaled)
    return PackedTensor(scaled.to(dtype), packed.shape, scale, packed.indices)


def _block_size(packed: PackedTensor) -> int:
    """Values that share an exponent; 0 where there is no such number."""
    values = packed.values
    if packed.indices is not None or values.ndim == 0 or not values.numel():
        return 0
    if isinstance(values, DTensor) and (
        values.ndim == 1 or not all(p.is_shard(0) or p.is_replicate() for p in values.placements)
    ):
        return 0
    row = values.numel() // (values.shape[0] if values.ndim > 1 else 1)
    return next((size for size in BLOCKS if row % size == 0), 0)


def _in_blocks(values: Tensor, shape: torch.Size, size: int) -> PackedTensor:
    own = local_part(values)
    blocks = own.reshape(-1, size)
    exponents = torch.frexp(blocks.amax(1)).exponent - 8 if len(blocks) else blocks.new_zeros(0)
    exponents = exponents.clamp(-120, 120)
    smallest = torch.finfo(FLOAT8).smallest_normal * torch.finfo(FLOAT8).eps
    scaled = blocks * torch.exp2(-exponents.float()).unsqueeze(1)
    scaled = torch.where(blocks > 0, scaled.clamp_min(smallest), scaled)
    # A vector has one row of blocks, and is never in shards here.
    held = with_local(scaled.to(FLOAT8), values)
    codes = exponents.to(torch.int8)
    if values.ndim == 1:
        return PackedTensor(held, shape, exponents=codes)
    row = (values.numel() // values.shape[0] // size,)
    return PackedTensor(held, shape, exponents=with_local(codes, values, row))


def with_rows(packed: PackedTensor, grown: Tensor) -> PackedTensor:
    """`packed` with the further rows of `grown`; those of a sparse tensor are 0."""
    if packed.indices is not None:
        return PackedTensor(packed.values, grown.shape, packed.scale, packed.indices)
    if packed.exponents is not None:
        return cast_to(with_rows(dense(whole(packed.kept())), grown), FLOAT8)
    values = whole(packed.values)
    rows = grown[values.shape[0] :].to(values.device) / packed.scale
    dtype = torch.promote_types(values.dtype, rows.dtype) if rows.any() else values.dtype
    values = torch.cat([values.to(dtype), rows.to(dtype)])
    return PackedTensor(values, grown.shape, packed.scale)


class Largest:
    """The ⌈fraction · entries⌉ largest importances of all tensors together, tensor by tensor.

    Entries that are 0 are never kept; of equal ones at the limit, the first are.

    Args:
        importances: gives all importances, flat fp32 tensors of at least 0, each time it is called.
        fraction: the share that is kept.
    """

    def __init__(self, importances: Callable[[], Iterable[Tensor]], fraction: float) -> None:
        size, histogram = 0, torch.zeros(1 << 15, dtype=torch.int64)
        for bits in _blocks_of(importances):
            size += bits.numel()
            histogram += _counts(bits >> 16, 1 << 15)
        # The small tolerance keeps 0.07 · 100 = 7.000000000000001 from being 8.
        keep = math.ceil(fraction * size - 1e-6)
        upper, keep = _place(histogram, keep)
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for bits in _blocks_of(importances):
            histogram += _counts(bits[(bits >> 16) == upper] & 0xFFFF, 1 << 16)
        lower, keep = _place(histogram, keep)
        self._limit, self._ties = (upper << 16) + lower, keep
        if self._limit == 0:
            self._limit, self._ties = 1, int(histogram[1]) if upper == 0 else 0

    def take(
        self, importance: Tensor, anchor: PackedTensor, dtype: torch.dtype
    ) -> tuple[PackedTensor, PackedTensor]:
        """The kept importances of the next tensor, and its anchor at the same places.

        Sparse, or dense with zeros where that takes less memory with an importance in `dtype`.
        """
        flat, shape = importance.flatten(), importance.shape
        bits = flat.view(torch.int32)
        equal = (bits == self._limit).nonzero().flatten()[: self._ties]
        self._ties -= equal.numel()
        indices = torch.cat([(bits > self._limit).nonzero().flatten(), equal]).sort().values
        index_dtype = torch.int32 if flat.numel() < 2**31 else torch.int64
        entry = dtype.itemsize + anchor.values.dtype.itemsize
        if indices.numel() * (index_dtype.itemsize + entry) >= flat.numel() * entry:
            kept = torch.zeros_like(flat).index_copy_(0, indices, flat[indices])
            anchors = anchor if anchor.indices is None else dense(anchor.dense())
            return dense(kept.view(shape)), anchors
        positions = indices.to(index_dtype)
        centers = anchor.dense().flatten()[indices].to(anchor.values.dtype)
        return (
            PackedTensor(flat[indices], shape, 1.0, positions),
            PackedTensor(centers, shape, 1.0, positions),
        )


def _blocks_of(importances: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    """The bits of all values, which order floats of at least 0 as integers, block by block."""
    for tensor in importances():
        for block in tensor.flatten().split(1 << 22):
            yield block.view(torch.int32).clamp_min(0)  # −0.0 counts as 0


def _counts(numbers: Tensor, bins: int) -> Tensor:
    return torch.bincount(numbers.flatten(), minlength=bins).cpu()


def _place(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the `keep`-th largest entry, and how many of it are among the largest."""
    above = histogram.flip(0).cumsum(0).flip(0)  # entries in this bin and those above
    found = int((above >= keep).nonzero().max()) if int(above[0]) >= keep else 0
    return found, keep - (int(above[found]) - int(histogram[found]))
