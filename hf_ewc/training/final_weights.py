"""Weights that are tested, saved and consolidated are to be the same.

A schedule-free optimizer (Defazio et al. 2024, arXiv 2405.15682) trains at one point and stands for
another, which it puts into the model by `eval()`; the Trainer calls that before evaluation alone.
Callbacks and subclasses that average weights may put others in for the time of an evaluation.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.names import parameters_by_name

logger = logging.getLogger("hf_ewc")


def use_final_weights(optimizer: Any) -> None:
    """Let an optimizer that holds two sequences put the final one into the model.

    Training puts back the other one at its next step.
    """
    switch = getattr(optimizer, "eval", None)
    if callable(switch):
        switch()


class WeightsInUse:
    """Compares the weights of one use (consolidated, tested, saved) with those of another."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Training has gone on."""
        self._use: str = ""
        self._sample: dict[int, float] = {}
        self._said = False

    def note(self, use: str, model: nn.Module) -> None:
        """Warn, once, if `model` has other weights than at an earlier use since training."""
        sample = _sample(model)
        if not self._use:
            self._use, self._sample = use, sample
        elif not self._said and _differ(sample, self._sample):
            self._said = True
            logger.warning(
                "The weights that were %s are not those that were %s, without training in between: "
                "something puts other weights into the model for a time, such as averaged ones. "
                "Put them in before consolidate(), so that the anchor is what is tested and saved.",
                use,
                self._use,
            )


@torch.no_grad()
def _sample(model: nn.Module) -> dict[int, float]:
    """A value from the middle of each parameter, or of this process's part of it, by identity.

    Parameters that are exchanged for others, as those of another task's head, are not compared.
    """
    sharding.reshard(model)
    parameters = parameters_by_name(model).values()
    parts = {id(p): sharding.local_part(p).reshape(-1) for p in parameters}
    return {key: float(part[len(part) // 2]) for key, part in parts.items() if len(part)}


def _differ(one: dict[int, float], other: dict[int, float]) -> bool:
    return any(value != other[key] for key, value in one.items() if key in other)
