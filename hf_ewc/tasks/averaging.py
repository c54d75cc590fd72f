"""Weights averaged over the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.parameters.sharding import local_part, part_like, whole_values


class Average:
    """θ ← (1 − α) θ* + α θ after a task, θ* the weights that it began with.

    With α = 1/k after the k-th task it is the mean of what the tasks found, each from where the
    last mean was; with a constant α an exponential average. Buffers are left as they are.

    Args:
        model: as it is before the task.
        alpha: α.
        free: by name, which rows of a parameter are not averaged, as those of new classes; None:
            all, as of a new head.
    """

    def __init__(
        self, model: nn.Module, alpha: float, free: Mapping[str, Sequence[int] | None]
    ) -> None:
        self._alpha, self._free = alpha, free
        self._start: dict[str, Tensor] = {
            name: (whole_values(p) if free.get(name) else p).detach().clone()
            for name, p in parameters_by_name(model, trainable_only=True).items()
            if free.get(name, ()) is not None
        }

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Average, in place; of parameters in shards each process does its part."""
        parameters = parameters_by_name(model)
        for name, start in self._start.items():
            now = local_part(parameters[name])
            if rows := self._free.get(name):
                start[list(rows)] = whole_values(parameters[name]).to(start)[list(rows)]
            before = part_like(start, parameters[name]).to(now.device)
            now.copy_(before + self._alpha * (now - before))


def alpha_of(average: str, constant: float, index: int) -> float:
    """α after task `index`, from 0: 1 / (index + 1) for the mean."""
    return 1.0 / (index + 1) if average == "mean" else constant
