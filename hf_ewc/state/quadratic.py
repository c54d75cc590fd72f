"""The quadratic that stands for any number of tasks: how it grows by one, and its value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_ewc.parameters import sharding
from hf_ewc.precision import widened, widest
from hf_ewc.state.packed import PackedTensor, copied

MODES = ("online", "separate")
BLOCK = 1 << 20
"""Entries that are worked on at a time: the scratch space is a few times 4 MiB."""


def grown(
    old: PackedTensor | None, fisher: Tensor | None, theta: Tensor, gamma: float, weight: float
) -> Tensor:
    """A' = γA + wF of one parameter θ, in fp32, in a new tensor that lies as θ does."""
    local = sharding.local_part(theta)
    total = torch.zeros(local.numel(), dtype=torch.float32, device=local.device)
    if old is not None:
        total.add_(flat_part(old.dense(), theta)).mul_(gamma)
    if fisher is not None:
        for sums, values in zip(
            total.split(BLOCK), flat_part(fisher, theta).split(BLOCK), strict=True
        ):
            sums.add_(weight * values.float())
    return sharding.with_local(total, theta)


def combined(
    old: tuple[PackedTensor, PackedTensor, float] | None,
    fisher: Tensor | None,
    theta: Tensor,
    mode: str,
    gamma: float,
    weight: float,
) -> tuple[Tensor, Tensor, float]:
    """A', c' and offset' of one parameter; the equations of `EWCState.consolidate`.

    Beside its arguments and results it holds one tensor more, where the old importance or anchor
    has to be unpacked, and blocks.
    """
    total = grown(None if old is None else old[0], fisher, theta, gamma, weight)
    if old is None or mode == "online":
        return total, copied(theta), 0.0
    wide = torch.promote_types(theta.dtype, torch.float32)
    moved = torch.empty(sharding.local_part(theta).numel(), dtype=wide, device=total.device)
    added = torch.zeros((), dtype=widest(total.device), device=total.device)
    importance, anchor = (flat_part(packed.dense(), theta) for packed in old[:2])
    nothing = torch.zeros(1, device=total.device).expand(len(moved))
    new = nothing if fisher is None else flat_part(fisher, theta)
    operands = importance, anchor, new, flat_part(total, theta), flat_part(theta, theta)
    for center, a, c, f, sums, t in _blocks(moved, *operands):
        step, protected = t.to(wide) - c.to(wide), sums > 0
        share = torch.where(protected, weight * f.float() / sums, 1.0)
        # θ itself where nothing else counts, not what rounding makes of c + (θ − c)
        center.copy_(torch.where(protected & (share < 1), c + share * step, t.to(wide)))
        added += (gamma * widened(a) * share * widened(step).square()).sum()
    summed = sharding.summed_over_parts(added, theta)
    offset = gamma * old[2] + 0.5 * summed.item()
    return total, sharding.with_local(moved, theta), offset


def flat_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of `tensor`, of which it has what it has of `like`, as a vector."""
    return sharding.local_part(sharding.place_like(tensor.detach(), like)).reshape(-1)


def _blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(vector.split(BLOCK) for vector in vectors), strict=True)


def half_square(importance: PackedTensor, anchor: PackedTensor, theta: Tensor) -> Tensor:
    """½ Σ A (θ − c)² over the entries that are held, with a graph."""
    if importance.indices is not None:
        theta = sharding.whole(theta).flatten()[importance.indices.to(theta.device).long()]
    dtype = torch.promote_types(theta.dtype, torch.float32)
    strength = sharding.place_like(importance.kept(), theta).to(dtype)
    distance = theta.to(dtype) - sharding.place_like(anchor.kept(), theta).to(dtype)
    return sharding.whole(0.5 * (strength * distance * distance).sum())


def sum_of(terms: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of terms on any devices; of none a 0 on `device` that has a gradient of nothing."""
    if not terms:
        return torch.zeros((), device=device, requires_grad=True)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
