"""½ Σ F (θ − c)² and its gradient, in one pass over memory.

The passes here know flat tensors only, not models: they read θ, F and c once, add the gradient in
place, and need scratch space of a few blocks, never a copy of all parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_BLOCK = 1 << 17
"""Elements per block on a CPU: two fp32 scratch blocks of 512 KiB stay in the L2 cache."""
DEVICE_BLOCK = 1 << 24
"""Elements per group of `torch._foreach` calls on an accelerator: 64 MiB of fp32 scratch each."""


@dataclass(frozen=True)
class Piece:
    """One tensor's share of the sum, everything flat and of equal length n.

    Args:
        theta: current values; with `index` the whole tensor, of which n entries count.
        importance: F / scale, [n], any floating dtype; in 8 bits with `exponents`.
        anchor: c, [n].
        gradient: where the gradient is added (as long as `theta`), or None for the value alone.
        strength: λ, times the value.
        scale: what one unit of `importance` is worth: F is `importance * scale`.
        index: positions of the n entries in `theta`, or None when they are all of it.
        exponents: powers of two that equal blocks of `importance` are multiplied by, or None.
    """

    theta: Tensor
    importance: Tensor
    anchor: Tensor
    gradient: Tensor | None
    strength: float = 1.0
    scale: float = 1.0
    index: Tensor | None = None
    exponents: Tensor | None = None

    @property
    def wide_importance(self) -> Tensor:
        """The importance as it is multiplied: itself, or from 8 bits in fp32, a copy."""
        if self.exponents is None:
            return self.importance
        return (
            self.importance.float()
            .view(self.exponents.numel(), -1)
            .mul_(torch.exp2(self.exponents.float()).unsqueeze(1))
            .view(-1)
        )


def value_and_gradient(pieces: Sequence[Piece], loss_scale: float = 1.0) -> Tensor:
    """λ/2 Σ F (θ − c)² of each piece; adds `loss_scale` · λ F (θ − c) to its gradient.

    Computed in fp32 (fp64 for fp64 parameters) whatever the dtypes of the operands.

    Args:
        pieces: all on one device.
        loss_scale: what the gradients in place are multiplied by (a gradient scaler's scale).

    Returns:
        fp32 or fp64, [len(pieces)], on the pieces' device; nothing waits for the device.
    """
    if not pieces:
        return torch.zeros(0)
    device = pieces[0].theta.device
    if _on_host(device):
        scratch = _scratch(pieces)
        values = [_in_cache(piece, loss_scale, scratch) for piece in pieces]
        return torch.tensor(values, dtype=torch.float64)
    sums: list[list[Tensor]] = [[] for _ in pieces]
    for members in _groups(pieces):
        block_sums = _foreach([block for _, block in members], loss_scale)
        for (owner, _), value in zip(members, block_sums, strict=True):
            sums[owner].append(value)
    return torch.stack([torch.stack(parts).sum() for parts in sums])


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _scratch(pieces: Sequence[Piece]) -> Tensor:
    """Room for two blocks of the widest dtype, shared by all pieces of it."""
    size = min(CACHE_BLOCK, max(piece.importance.numel() for piece in pieces))
    wide = any(piece.theta.dtype == torch.float64 for piece in pieces)
    return torch.empty(2, max(size, 1), dtype=torch.float64 if wide else torch.float32)


def _in_cache(piece: Piece, loss_scale: float, scratch: Tensor) -> float:
    """One piece on a CPU, block by block through two scratch blocks."""
    dtype = torch.promote_types(piece.theta.dtype, torch.float32)
    rows = scratch if scratch.dtype == dtype else torch.empty_like(scratch, dtype=dtype)
    factor = loss_scale * piece.strength * piece.scale
    if piece.importance.numel() <= rows.shape[1]:
        return 0.5 * piece.strength * piece.scale * _one_block(piece, rows, factor)
    blocks = _blocks(piece, rows.shape[1])
    total = sum(_one_block(block, rows, factor) for block in blocks)
    return 0.5 * piece.strength * piece.scale * total


def _one_block(block: Piece, scratch: Tensor, factor: float) -> float:
    """Σ F (θ − c)² of a block, in units of its scale; adds `factor` times its gradient."""
    first, second = scratch[:, : block.importance.numel()].unbind()
    theta = block.theta if block.index is None else block.theta[block.index]
    if theta.dtype != scratch.dtype:  # two half-precision operands would be subtracted in theirs
        theta = first.copy_(theta)
    delta = torch.sub(theta, block.anchor, out=first)
    pull = torch.mul(delta, block.wide_importance, out=second)
    value = torch.dot(delta, pull).item()
    _add(block, pull, factor)
    return value


def _foreach(blocks: Sequence[Piece], loss_scale: float) -> tuple[Tensor, ...]:
    """Many blocks on an accelerator with a handful of kernels; λ/2 Σ F (θ − c)² of each."""
    device = blocks[0].theta.device
    theta = [b.theta if b.index is None else b.theta[b.index] for b in blocks]
    delta = torch._foreach_sub(_wide(theta, device), _wide([b.anchor for b in blocks], device))
    pull = torch._foreach_mul(delta, _wide([b.wide_importance for b in blocks], device))
    torch._foreach_mul_(delta, pull)
    # F (θ − c)² is nowhere below 0, so its 1-norm is its sum, and that has a foreach kernel.
    values: tuple[Tensor, ...] = tuple(torch._foreach_norm(delta, 1))
    torch._foreach_mul_(values, [0.5 * b.strength * b.scale for b in blocks])
    torch._foreach_mul_(pull, [loss_scale * b.strength * b.scale for b in blocks])
    gradients, added = [], []
    for block, force in zip(blocks, pull, strict=True):
        if block.gradient is not None and block.index is None:
            gradients.append(block.gradient)
            added.append(force)
        else:
            _add(block, force, 1.0)
    if gradients:
        torch._foreach_add_(gradients, added)
    return values


def _wide(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`, in fp32 or better; themselves where they are so already."""
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    return [t.to(device, d, non_blocking=True) for t, d in zip(tensors, wide, strict=True)]


def _add(block: Piece, pull: Tensor, factor: float) -> None:
    if block.gradient is None:
        return
    if block.index is None:
        block.gradient.add_(pull, alpha=factor)
    else:
        added = (pull * factor).to(block.gradient.dtype)
        block.gradient.index_add_(0, block.index, added)


def _blocks(piece: Piece, size: int) -> Iterator[Piece]:
    """`piece` in consecutive parts of at most `size` entries, as views."""
    if piece.importance.numel() <= size:
        yield piece
        return
    importances, anchors = piece.importance.split(size), piece.anchor.split(size)
    parts = len(anchors)
    thetas: Sequence[Tensor] = [piece.theta] * parts
    gradients: Sequence[Tensor | None] = [piece.gradient] * parts
    indices: Sequence[Tensor | None] = [None] * parts
    if piece.index is not None:
        indices = piece.index.split(size)
    else:
        thetas = piece.theta.split(size)
        gradients = gradients if piece.gradient is None else piece.gradient.split(size)
    exponents: Sequence[Tensor | None] = [None] * parts
    if piece.exponents is not None:  # a power of two of values has one, so none is cut
        shared = piece.importance.numel() // piece.exponents.numel()
        exponents = piece.exponents.split(size // shared)
    columns = thetas, importances, anchors, gradients, indices, exponents
    for t, f, c, g, i, e in zip(*columns, strict=True):
        yield Piece(t, f, c, g, piece.strength, piece.scale, i, e)


def _groups(pieces: Sequence[Piece]) -> Iterator[list[tuple[int, Piece]]]:
    """Blocks of all pieces with the number of their piece, in groups of about DEVICE_BLOCK."""
    group: list[tuple[int, Piece]] = []
    filled = 0
    for owner, piece in enumerate(pieces):
        for block in _blocks(piece, DEVICE_BLOCK):
            size = block.importance.numel()
            if group and filled + size > DEVICE_BLOCK:
                yield group
                group, filled = [], 0
            group.append((owner, block))
            filled += size
    if group:
        yield group
