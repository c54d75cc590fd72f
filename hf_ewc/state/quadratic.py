"""The quadratic that stands for any number of tasks: how it grows by one, and its value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_ewc.importance import Fisher
from hf_ewc.parameters import sharding
from hf_ewc.state.packing import PackedTensor, copied

MODES = ("online", "separate")


def combined(
    old: tuple[Tensor, Tensor, float] | None,
    fisher: Tensor | None,
    parameter: Tensor,
    mode: str,
    gamma: float,
    weight: float,
) -> tuple[Tensor, Tensor, float]:
    """A', c' and offset' of one parameter; the equations of `EWCState.consolidate`."""
    theta = parameter.detach()
    if fisher is None:
        new = torch.zeros_like(theta, dtype=torch.float32)
    else:
        new = weight * sharding.place_like(fisher, theta).float()
    if old is None:
        return new, copied(theta), 0.0
    earlier, anchor, offset = old
    earlier = gamma * earlier
    total = earlier + new
    if mode == "online":
        return total, copied(theta), 0.0
    dtype = torch.promote_types(theta.dtype, torch.float32)
    step = theta.to(dtype) - anchor.to(dtype)
    protected = total > 0
    share = torch.where(protected, new / total, 1.0)
    # θ itself where nothing else counts, not what rounding makes of anchor + (θ − anchor)
    moved = torch.where(protected & (share < 1), anchor + share * step, theta.to(dtype))
    added = sharding.whole((earlier * share * step * step).sum(dtype=torch.float64))
    return total, moved, gamma * offset + 0.5 * added.item()


def half_square(importance: PackedTensor, anchor: PackedTensor, theta: Tensor) -> Tensor:
    """½ Σ A (θ − c)² over the entries that are held, with a graph."""
    if importance.indices is not None:
        theta = sharding.whole(theta).flatten()[importance.indices.to(theta.device).long()]
    dtype = torch.promote_types(theta.dtype, torch.float32)
    strength = sharding.place_like(importance.kept(), theta).to(dtype)
    distance = theta.to(dtype) - sharding.place_like(anchor.kept(), theta).to(dtype)
    return sharding.whole(0.5 * (strength * distance * distance).sum())


def check_arguments(
    fisher: Fisher, mode: str, gamma: float, weight: float, name: str | None
) -> None:
    if not isinstance(fisher, Fisher):
        raise TypeError(f"fisher must be a Fisher, got {type(fisher).__name__}.")
    if not fisher.diagonal:
        raise ValueError("The Fisher has no parameters; estimate it for at least one.")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(map(repr, MODES))}.")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma!r}; allowed is a number from 0 to 1.")
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"weight is {weight!r}; allowed is a finite number of at least 0.")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}, {name!r}; a task's name is a string.")
