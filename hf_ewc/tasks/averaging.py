"""Weights averaged over the tasks."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.parameters.sharding import local_part, part_like


class Average:
    """θ ← (1 − α) θ* + α θ after a task, θ* the weights that it began with.

    With α = 1/k after the k-th task it is the mean of what the tasks found, each from where the
    last mean was; with a constant α an exponential average. Buffers are left as they are.

    Args:
        model: as it is before the task.
        alpha: α.
        free: names of parameters that are not averaged, as a head that is new.
    """

    def __init__(self, model: nn.Module, alpha: float, free: Collection[str] = ()) -> None:
        self._alpha = alpha
        self._start: dict[str, Tensor] = {
            name: parameter.detach().clone()
            for name, parameter in parameters_by_name(model, trainable_only=True).items()
            if name not in free
        }

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Average, in place; of parameters in shards each process does its part."""
        parameters = parameters_by_name(model)
        for name, start in self._start.items():
            now = local_part(parameters[name])
            before = part_like(start, parameters[name]).to(now.device)
            now.copy_(before + self._alpha * (now - before))


def alpha_of(average: str, constant: float, index: int) -> float:
    """α after task `index`, from 0: 1 / (index + 1) for the mean."""
    return 1.0 / (index + 1) if average == "mean" else constant
