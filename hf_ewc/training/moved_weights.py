"""Whether training moves weights where no penalty enters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_ewc.parameters.sharding import local_part

# So many of the smallest weights tell whether others are moved.
_LOOKED_AT = 4


class MovedWeights:
    """A few of these weights as they are now, to see later whether they were moved."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        few = sorted((w for w in weights if w.requires_grad), key=Tensor.numel)[:_LOOKED_AT]
        self._before = [(w, local_part(w.detach()).clone()) for w in few]

    def refuse(self) -> None:
        """Raise a `RuntimeError` if they were."""
        if any(not torch.equal(local_part(w.detach()), value) for w, value in self._before):
            raise RuntimeError(
                "The training moved weights that EWC protects by itself, without a backward "
                "pass and a step of a torch optimizer, where the penalty's gradient enters: they "
                "were trained without it. Let a torch.optim.Optimizer take the step, or train "
                "without ewc_state and add ewc_lambda * state.penalty(model) to the loss."
            )
