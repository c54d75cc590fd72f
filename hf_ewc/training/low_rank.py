"""½ Σ F (W − c)² for W = W₀ + Σ s L R, and its gradients on L and R, in one pass over F.

With M = λ F ⊙ (W − c) the chain rule gives ∂L = s M Rᵀ and ∂R = s Lᵀ M (for LoRA, L = B and R = A).
Rows are worked on in blocks, so nothing of the size of W is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_ELEMENTS = 1 << 18
"""Entries of W per block on a CPU: scratch of 1 MiB in fp32 for each of three tensors."""
DEVICE_ELEMENTS = 1 << 24
"""Entries of W per block on an accelerator: 64 MiB of fp32 scratch for each of three tensors."""


@dataclass(frozen=True)
class Product:
    """One share s · L R of a weight of rows × columns.

    Args:
        left: L, (rows, r).
        right: R, (r, columns).
        scale: s.
        left_gradient, right_gradient: fp32 or better, where ∂L and ∂R are added; None for none.
    """

    left: Tensor
    right: Tensor
    scale: float
    left_gradient: Tensor | None = None
    right_gradient: Tensor | None = None


@dataclass(frozen=True)
class AdaptedPiece:
    """The entries [start, start + n) of a flat W of rows × columns, as one process holds them.

    Args:
        base: W₀ of these entries, [n].
        importance: F, [n], or with `index` the k kept values; it stands for `importance * scale`.
        anchor: c, as `importance`.
        products: what is added to W₀, whole.
        columns: of W.
        start: number of the first entry.
        base_gradient: where M is added, [n], if W₀ itself is trained.
        strength: λ, times the value.
        scale: what one unit of `importance` is worth.
        index: positions of the k kept values in these entries, ascending; None: all of them.
    """

    base: Tensor
    importance: Tensor
    anchor: Tensor
    products: Sequence[Product]
    columns: int
    start: int = 0
    base_gradient: Tensor | None = None
    strength: float = 1.0
    scale: float = 1.0
    index: Tensor | None = None


@torch.no_grad()
def adapted_value_and_gradient(piece: AdaptedPiece, gradient_scale: float = 1.0) -> Tensor:
    """λ/2 Σ F (W − c)² of these entries; adds `gradient_scale` times its gradients in place.

    Computed in fp32 (fp64 for fp64 weights).

    Returns:
        A 0-dim tensor on the device of `base`, in fp64 on a CPU; nothing waits for the device.
    """
    dtype = torch.promote_types(piece.base.dtype, torch.float32)
    exact = torch.float64 if piece.base.device.type == "cpu" else dtype
    total = torch.zeros((), dtype=exact, device=piece.base.device)
    products = [_wide(product, dtype) for product in piece.products]
    for first, last in _row_blocks(piece):
        total += _block(piece, products, first, last, gradient_scale)
    return (0.5 * piece.strength * piece.scale) * total


@torch.no_grad()
def entries(piece: AdaptedPiece) -> Tensor:
    """W of these entries, [n], in fp32 or better."""
    dtype = torch.promote_types(piece.base.dtype, torch.float32)
    products = [_wide(product, dtype) for product in piece.products]
    found = piece.base.to(dtype, copy=True)
    for first, last in _row_blocks(piece):
        start, stop = _bounds(piece, first, last)
        change = _sum_of_products(products, first, last)
        found[start:stop] += change.view(-1)[_inside(piece, first, start, stop)]
    return found


def _block(
    piece: AdaptedPiece, products: Sequence[Product], first: int, last: int, gradient_scale: float
) -> Tensor:
    """Σ F (W − c)² over the rows [first, last), without constants; adds the gradients."""
    start, stop = _bounds(piece, first, last)
    weight = _sum_of_products(products, first, last)
    entries = weight.view(-1)[_inside(piece, first, start, stop)]
    entries += piece.base[start:stop]
    importance, anchor = _dense(piece, start, stop, entries)
    distance = entries.sub_(anchor)
    pull = importance.mul_(distance)
    value = torch.dot(pull, distance)
    factor = gradient_scale * piece.strength * piece.scale
    if piece.base_gradient is not None:
        piece.base_gradient[start:stop].add_(pull, alpha=factor)
    if any(p.left_gradient is not None or p.right_gradient is not None for p in products):
        force = _whole_rows(pull, piece, first, last, start, stop)
        for product in products:
            _add_gradients(product, force, first, last, factor)
    return value


def _sum_of_products(products: Sequence[Product], first: int, last: int) -> Tensor:
    """Σ s L R of the rows [first, last), a new tensor."""
    one = products[0]
    total = torch.mm(one.left[first:last], one.right).mul_(one.scale)
    for other in products[1:]:
        total.addmm_(other.left[first:last], other.right, alpha=other.scale)
    return total


def _add_gradients(product: Product, force: Tensor, first: int, last: int, factor: float) -> None:
    scale = factor * product.scale
    if product.left_gradient is not None:
        product.left_gradient[first:last].addmm_(force, product.right.T, alpha=scale)
    if product.right_gradient is not None:
        product.right_gradient.addmm_(product.left[first:last].T, force, alpha=scale)


def _dense(piece: AdaptedPiece, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """F (a copy) and c of the entries [start, stop); sparse ones are 0 where nothing is kept."""
    if piece.index is None:
        importance = torch.empty_like(like).copy_(piece.importance[start:stop])
        return importance, piece.anchor[start:stop].to(like)
    bounds = torch.searchsorted(
        piece.index, torch.tensor([start, stop], dtype=piece.index.dtype, device=like.device)
    )
    kept = slice(*bounds.tolist())
    where = piece.index[kept] - start
    importance, anchor = torch.zeros_like(like), torch.zeros_like(like)
    importance[where] = piece.importance[kept].to(like)
    anchor[where] = piece.anchor[kept].to(like)
    return importance, anchor


def _whole_rows(
    pull: Tensor, piece: AdaptedPiece, first: int, last: int, start: int, stop: int
) -> Tensor:
    """The entries as rows × columns, 0 where another process holds the rest of a row."""
    size = (last - first) * piece.columns
    if pull.numel() < size:
        whole = pull.new_zeros(size)
        whole[_inside(piece, first, start, stop)] = pull
        pull = whole
    return pull.view(last - first, piece.columns)


def _bounds(piece: AdaptedPiece, first: int, last: int) -> tuple[int, int]:
    """Which of the piece's entries lie in the rows [first, last)."""
    start = max(first * piece.columns, piece.start) - piece.start
    stop = min(last * piece.columns, piece.start + piece.base.numel()) - piece.start
    return start, stop


def _inside(piece: AdaptedPiece, first: int, start: int, stop: int) -> slice:
    """Where the entries [start, stop) lie in the flat rows from `first` on."""
    offset = piece.start - first * piece.columns
    return slice(start + offset, stop + offset)


def _row_blocks(piece: AdaptedPiece) -> Iterator[tuple[int, int]]:
    """[first, last) of the rows that hold entries of this piece, block by block."""
    if piece.base.numel() == 0:
        return
    elements = CACHE_ELEMENTS if piece.base.device.type == "cpu" else DEVICE_ELEMENTS
    rows = max(1, elements // piece.columns)
    end = -(-(piece.start + piece.base.numel()) // piece.columns)
    for first in range(piece.start // piece.columns, end, rows):
        yield first, min(first + rows, end)


def _wide(product: Product, dtype: torch.dtype) -> Product:
    return Product(
        product.left.to(dtype),
        product.right.to(dtype),
        product.scale,
        product.left_gradient,
        product.right_gradient,
    )
