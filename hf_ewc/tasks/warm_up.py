"""Head warm-up: the first steps of a task train the head alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hf_ewc.parameters.names import parameters_by_name


class HeadWarmUp:
    """In the first round(share · steps) optimizer steps of a task, gradients but the head's go.

    A pretrained backbone is not distorted while a head that knows nothing is first fitted (Kumar et
    al. 2022, arXiv 2202.10054). Without a gradient an optimizer leaves a parameter as it is,
    without decay or momentum; clipping and `grad_norm` see the head's gradients alone.

    Args:
        model: wrapped or not.
        head: names of the head's parameters.
        share: of the steps.
    """

    def __init__(self, model: nn.Module, head: Iterable[str], share: float) -> None:
        self._model, self._head, self.share = model, set(head), share

    def after_backward(self, step: int, max_steps: int) -> None:
        """Take the gradients away, if the optimizer step that comes is the warm-up's."""
        if step >= round(self.share * max_steps):
            return
        for name, parameter in parameters_by_name(self._model, trainable_only=True).items():
            if name not in self._head:
                parameter.grad = None
