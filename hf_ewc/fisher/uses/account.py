"""The uses of one parameter, and the sum of squares that they add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_ewc.fisher.uses.parts import Part

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset into the parameter


class Site:
    """One use of a tensor: opened in the forward, delivered once a pass in the backward."""

    def __init__(
        self, tensor: Tensor, accounts: list[Account], on_delivery: Callable[[Site], None]
    ) -> None:
        self.tensor = tensor
        self.accounts = accounts
        self.part: Part | None = None
        self._on_delivery = on_delivery

    def deliver(self, part: Part) -> None:
        self.part = part
        self._on_delivery(self)


@dataclass(eq=False)
class Account:
    """The uses of one parameter, and the sum of squares they add up to."""

    name: str
    parameter: Tensor
    total: Tensor | None = None
    direct: list[tuple[Site, Geometry]] = field(default_factory=list)
    derived: list[Site] = field(default_factory=list)
    outstanding: int = 0

    def sum_of_squares(self) -> Tensor:
        """The accumulator, strided like the parameter, fp32 (fp64 for an fp64 parameter)."""
        if self.total is None:
            dtype = torch.promote_types(self.parameter.dtype, torch.float32)
            self.total = _zeros_strided_like(self.parameter, dtype)
        return self.total


def _zeros_strided_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros whose elements lie as those of `tensor`, with gaps where it has gaps."""
    size, stride = tensor.size(), tensor.stride()
    if tensor.numel() == 0:
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
    extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return torch.zeros(extent, dtype=dtype, device=tensor.device).as_strided(size, stride)


def repeats(tensor: Tensor) -> bool:
    """Whether several elements of `tensor` are one element in memory, as after `expand`."""
    return any(
        stride == 0 and size > 1
        for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
    )
