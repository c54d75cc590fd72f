"""The uses of one parameter, and the sum of squares that they add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_ewc.fisher.uses.gradients import PerExampleGradient

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset into the parameter


class Use:
    """One use of a tensor: opened in the forward, delivered once a pass in the backward.

    Args:
        sums: of the parameters that the tensor is, or is derived from.
    """

    def __init__(
        self, tensor: Tensor, sums: list[SquareSum], on_delivery: Callable[[Use], None]
    ) -> None:
        self.tensor = tensor
        self.sums = sums
        self.gradient: PerExampleGradient | None = None
        self._on_delivery = on_delivery

    def deliver(self, gradient: PerExampleGradient) -> None:
        self.gradient = gradient
        self._on_delivery(self)


@dataclass(eq=False)
class SquareSum:
    """The uses of one parameter, and the sum of squares they add up to."""

    name: str
    parameter: Tensor
    total: Tensor | None = None
    direct: list[tuple[Use, Geometry]] = field(default_factory=list)
    derived: list[Use] = field(default_factory=list)
    outstanding: int = 0

    def sum_of_squares(self) -> Tensor:
        """The accumulator."""
        if self.total is None:
            self.total = self.zeros()
        return self.total

    def zeros(self) -> Tensor:
        """Strided like the parameter, fp32 (fp64 for an fp64 parameter)."""
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        return _zeros_strided_like(self.parameter, dtype)


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
