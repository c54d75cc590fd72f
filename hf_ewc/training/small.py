"""½ Σ F (θ − c)² of small tensors on a CPU, where looking things up would cost more than the sums.

What does not change between the steps of a run is looked up once. A step reads θ, F and c and adds
to the gradient, each in one call; the sum is taken block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ewc.parameters import sharding
from hf_ewc.training.gradients import gradient_of

LARGEST = 1 << 19
"""Entries of the largest tensor that counts as small."""
BLOCK = 1 << 16
"""Entries that are summed in fp32; sums of blocks are added in fp64."""


class SmallTensor:
    """One parameter with its importance, its anchor, and room for what is in between.

    Args:
        parameter: θ, fp32, contiguous, on a CPU, whole; also where its values move later.
        importance, anchor: F / scale and c, flat, fp32.
        strength: λ · scale.
        scratch: [n or more], shared with others.
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
        flat = scratch[: parameter.numel()]
        self._distance = flat.view(parameter.shape)
        self._blocks = list(zip(flat.split(BLOCK), importance.split(BLOCK), strict=True))
        self._look_up()

    def _look_up(self) -> None:
        """The values as a view, until they move; a copy of them is made anew each time."""
        contiguous = self._parameter.is_contiguous()
        self._place = self._parameter.data_ptr() if contiguous else None
        self._theta = self._parameter.detach().contiguous()

    def value_and_gradient(self, loss_scale: float | None) -> float:
        """λ/2 Σ F (θ − c)²; with `loss_scale`, adds that times λ F (θ − c) to the gradient."""
        parameter = self._parameter
        if parameter.data_ptr() != self._place:
            self._look_up()
        distance = torch.sub(self._theta, self._anchor, out=self._distance)
        if loss_scale is not None and parameter.requires_grad:
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse or not gradient.is_contiguous():
                gradient = gradient_of(parameter).view(parameter.shape)
            factor = loss_scale * self._strength
            gradient.addcmul_(self._importance, distance, value=factor)
        total = sum(torch.dot(d.mul_(d), f).item() for d, f in self._blocks)
        return 0.5 * self._strength * total


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
