"""½ Σ F (θ − c)² of small tensors on a CPU, where looking things up would cost more than the sums.

What does not change between the steps of a run is looked up once. A step reads θ, F and c and adds
to the gradient block by block; what is in between stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ewc.parameters import sharding
from hf_ewc.training.gradients import gradient_of

LARGEST = 1 << 19
"""Entries of the largest tensor that counts as small."""
BLOCK = 1 << 16
"""Entries of a block: its four operands of 256 KiB stay in the L2 cache."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of θ, c and F as they lie in the parameter; F again, and the scratch twice, flat."""

    theta: Tensor
    anchor: Tensor
    importance: Tensor
    flat_importance: Tensor
    distance: Tensor
    flat_distance: Tensor


class SmallTensor:
    """One parameter with its importance, its anchor, and room for what is in between.

    Args:
        parameter: θ, fp32, contiguous, on a CPU, whole; also where its values move later.
        importance, anchor: F / scale and c, flat, fp32.
        strength: λ · scale.
        scratch: [n or more], of a block or of the parameter where that is less; shared with others.
    """

    def __init__(
        self,
        parameter: Tensor,
        importance: Tensor,
        anchor: Tensor,
        strength: float,
        scratch: Tensor,
    ) -> None:
        self._parameter = parameter
        self._importance, self._anchor = (t.view(parameter.shape) for t in (importance, anchor))
        self._strength = strength
        self._rows = rows_of_block(parameter)
        self._scratch = scratch
        self._look_up()

    def _look_up(self) -> None:
        """The values as views, until they move; a copy of them is made anew each time."""
        contiguous = self._parameter.is_contiguous()
        self._place = self._parameter.data_ptr() if contiguous else None
        theta = self._parameter.detach().contiguous()
        rows = (self._in_rows(t) for t in (theta, self._anchor, self._importance))
        self._blocks = [self._block(*parts) for parts in zip(*rows, strict=True)]

    def _in_rows(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._rows) if self._rows else (tensor,)

    def _block(self, theta: Tensor, anchor: Tensor, importance: Tensor) -> _Block:
        flat = self._scratch[: theta.numel()]
        return _Block(theta, anchor, importance, importance.view(-1), flat.view(theta.shape), flat)

    def value_and_gradient(self, loss_scale: float | None) -> float:
        """λ/2 Σ F (θ − c)²; with `loss_scale`, adds that times λ F (θ − c) to the gradient."""
        parameter = self._parameter
        if parameter.data_ptr() != self._place:
            self._look_up()
        if loss_scale is None or not parameter.requires_grad:
            return 0.5 * self._strength * sum(map(_value, self._blocks))
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse or not gradient.is_contiguous():
            gradient = gradient_of(parameter).view(parameter.shape)
        factor, total = loss_scale * self._strength, 0.0
        for block, part in zip(self._blocks, self._in_rows(gradient), strict=True):
            distance = torch.sub(block.theta, block.anchor, out=block.distance)
            part.addcmul_(block.importance, distance, value=factor)
            total += _weighted_square(block)
        return 0.5 * self._strength * total


def _value(block: _Block) -> float:
    torch.sub(block.theta, block.anchor, out=block.distance)
    return _weighted_square(block)


def _weighted_square(block: _Block) -> float:
    """Σ F d², where the scratch holds d; overwrites it."""
    flat = block.flat_distance
    return torch.dot(flat.mul_(flat), block.flat_importance).item()


def rows_of_block(parameter: Tensor) -> int:
    """Along the first axis, how many make a block; 0 where all of it is one."""
    if parameter.numel() <= BLOCK:
        return 0
    return max(1, BLOCK * len(parameter) // parameter.numel())


def scratch_size(parameter: Tensor) -> int:
    """Entries of the largest block of a parameter."""
    rows = rows_of_block(parameter)
    return rows * parameter[0].numel() if rows else parameter.numel()


def is_small(parameter: Tensor, importance: Tensor, anchor: Tensor) -> bool:
    """Whether `SmallTensor` can take these."""
    return (
        not sharding.is_sharded(parameter)
        and parameter.is_contiguous()
        and parameter.numel() == importance.numel() <= LARGEST
        and all(
            t.dtype == torch.float32 and t.device.type == "cpu"
            for t in (parameter, importance, anchor)
        )
    )
