"""Sums over examples of squared per-example gradients, accumulated in place.

Every function adds Σ_n G_n² (element-wise square, G_n the gradient of example n) to `total`, in
the dtype of `total`; none ever holds one gradient per example of a whole weight matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of one block of `total`: on a CPU it stays in the second-level cache with its scratch
# twin, on an accelerator it bounds the scratch memory.
_CPU_BLOCK_ELEMENTS = 1 << 17
_ACCELERATOR_BLOCK_ELEMENTS = 1 << 24
# Its rows are a multiple of this: a product of fewer, or of an odd number of them, is slower.
_ROWS = 64
# Gradients of fewer entries are squared all at once, larger ones without a copy of all of them.
_SMALL = 1 << 14
# Up to this many positions the pairs of positions are cheaper than a product per example.
_FEW_POSITIONS = 3
Pair = tuple[Tensor, Tensor]  # output gradients (T, O) and inputs (T, I) of one example


def add_dense(total: Tensor, gradients: Tensor) -> None:
    """total += Σ_n G_n², with `gradients` (B, *total.shape) holding the G_n."""
    if total.numel() < _SMALL:
        total.add_(gradients.to(total.dtype).square().sum(0))
        return
    for gradient in gradients:
        _add_square(total, gradient)


def add_linear(total: Tensor, gradients: Tensor, inputs: Tensor) -> None:
    """total += Σ_n (gₙᵀ xₙ)² for a linear map.

    As many operations as the batched weight gradient gᵀx itself, 2·B·T·O·I.

    Args:
        total: (O, I).
        gradients: g, (B, T, O), with respect to the outputs.
        inputs: x, (B, T, I).
    """
    positions = gradients.shape[1]
    if positions > _FEW_POSITIONS:
        add_linear_pairs(total, list(zip(gradients, inputs, strict=True)))
        return
    # (Σ_t g_t x_t)² = Σ_{t ≤ s} w_ts (g_t g_s)(x_t x_s), w = 1 on the diagonal and 2 off it
    gradients, inputs = gradients.to(total.dtype), inputs.to(total.dtype)
    first, second = torch.triu_indices(positions, positions, device=total.device)
    weights = (2 - (first == second).to(total.dtype)).unsqueeze(-1)
    left = gradients[:, first] * gradients[:, second] * weights
    right = inputs[:, first] * inputs[:, second]
    total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))


def add_linear_pairs(
    total: Tensor, pairs: Sequence[Pair], rows: Sequence[Pair] | None = None
) -> None:
    """total += Σ_n (gₙᵀ xₙ + Rₙ)² with examples of any lengths.

    Block by block of `total`'s rows, all examples within a block, so that both the block and the
    product of one example stay in cache.

    Args:
        total: (O, I).
        pairs: (gₙ, xₙ) of each example, (T_n, O) and (T_n, I).
        rows: for a weight that is also looked up (tied embeddings) the (indices, gradients) of
            each example's look-ups, (L_n,) sorted and (L_n, I): R_n[i] = Σ_l [index_l = i] grad_l.
    """
    if pairs[0][0].dtype == torch.float16:  # a sum over positions may be more than it holds
        pairs = [(gradient.float(), value.float()) for gradient, value in pairs]
    height, width = total.shape
    step = _rows_of_block(total)
    scratch = total.new_empty(min(step, height), width, dtype=pairs[0][0].dtype)
    parts = [gradient.T.split(step) for gradient, _ in pairs]
    for number, block in enumerate(total.split(step)):
        product = scratch[: len(block)]
        for n, (_, value) in enumerate(pairs):
            torch.mm(parts[n][number], value, out=product)
            if rows is not None:
                _add_rows(product, rows[n], number * step)
            _add_square(block, product)


def _rows_of_block(total: Tensor) -> int:
    """How many rows a block has, so that all blocks are about as large."""
    on_cpu = total.device.type == "cpu"
    elements = _CPU_BLOCK_ELEMENTS if on_cpu else _ACCELERATOR_BLOCK_ELEMENTS
    blocks = max(1, round(total.numel() / elements))
    return max(1, round(len(total) / blocks / _ROWS)) * _ROWS


def _add_rows(block: Tensor, rows: Pair, start: int) -> None:
    """Add to a block of rows, of which `start` is the first, what lies within it."""
    indices, gradients = rows
    ends = torch.tensor([start, start + len(block)], device=indices.device)
    bounds = torch.searchsorted(indices, ends)
    low, high = bounds.tolist()
    if low < high:
        block.index_add_(0, indices[low:high] - start, gradients[low:high].to(block.dtype))


def _add_square(total: Tensor, values: Tensor) -> None:
    if values.dtype != total.dtype:
        values = values.to(total.dtype)
    total.addcmul_(values, values)


def add_lookups(total: Tensor, indices: Tensor, gradients: Tensor, owners: Tensor) -> None:
    """total += Σ_n R_n² with R_n[v] = Σ_{r : owner_r = n} [index_r = v] g_r, as of an embedding.

    Args:
        total: (V, D).
        indices: (R,).
        gradients: (R, D).
        owners: (R,), the example n of each.
    """
    size, width = total.shape
    keys, inverse = torch.unique(owners * size + indices, return_inverse=True)
    sums = total.new_zeros(keys.numel(), width)
    sums.index_add_(0, inverse, gradients.to(total.dtype))
    total.index_add_(0, keys % size, sums.square_())
