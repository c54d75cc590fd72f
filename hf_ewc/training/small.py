"""½ Σ F (θ − c)² of small tensors on a CPU, where looking things up would cost more than the sums.

What does not change between the steps of a run is looked up once; a step is four passes over
memory, of which two stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ewc.parameters import sharding
from hf_ewc.training.gradients import gradient_of

LARGEST = 1 << 19
"""Entries of the largest tensor that counts as small: scratch of 2 MiB for each of two tensors."""


class SmallTensor:
    """One parameter with its importance, its anchor, and room for what is in between.

    Args:
        parameter: θ, fp32, contiguous, on a CPU, whole; also where its values move later.
        importance, anchor: F / scale and c, flat, fp32.
        strength: λ · scale.
        scratch: [2, n or more], shared with others.
    """

    def __init__(
        self,
        parameter: Tensor,
        importance: Tensor,
        anchor: Tensor,
        strength: float,
        scratch: Tensor,
    ) -> None:
        self._parameter, self._importance, self._anchor = parameter, importance, anchor
        self._strength = strength
        self._distance, self._pull = scratch[:, : importance.numel()].unbind()
        self._look_up()

    def _look_up(self) -> None:
        """The values as a flat view, until they move; a copy of them is made anew each time."""
        contiguous = self._parameter.is_contiguous()
        self._place = self._parameter.data_ptr() if contiguous else None
        self._theta = self._parameter.detach().reshape(-1)

    def value_and_gradient(self, loss_scale: float | None) -> float:
        """λ/2 Σ F (θ − c)²; with `loss_scale`, adds that times λ F (θ − c) to the gradient."""
        if self._parameter.data_ptr() != self._place:
            self._look_up()
        torch.sub(self._theta, self._anchor, out=self._distance)
        torch.mul(self._distance, self._importance, out=self._pull)
        value = torch.dot(self._distance, self._pull).item()
        if loss_scale is not None and self._parameter.requires_grad:
            gradient = self._parameter.grad
            if gradient is None or gradient.is_sparse or not gradient.is_contiguous():
                gradient = gradient_of(self._parameter)
            gradient.view(-1).add_(self._pull, alpha=loss_scale * self._strength)
        return 0.5 * self._strength * value


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
