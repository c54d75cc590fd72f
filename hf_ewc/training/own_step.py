"""What a training step of a user's own makes of its batch: a Fisher cannot follow all of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hf_ewc")
_LIBRARIES = ("transformers", "trl", "hf_ewc")


class OwnStep:
    """Looks at the first training step of a run: which inputs reach the loss, if any do.

    Args:
        trainer: with a `training_step` of its own, or not.
    """

    def __init__(self, trainer: Any) -> None:
        step: Any = type(trainer).training_step
        self._is_own = step.__module__.partition(".")[0] not in _LIBRARIES
        self._name = type(trainer).__name__
        self._given: Any = None
        self._is_looked_at = False
        self._found: str | None = None

    @contextlib.contextmanager
    def around(self, inputs: Any) -> Iterator[None]:
        """Around the outermost training step on `inputs`."""
        if not self._is_own or self._is_looked_at:
            yield
            return
        self._given = inputs
        self._found = "computes its loss by itself"
        try:
            yield
        finally:
            self._given, self._is_looked_at = None, True

    def reaches(self, inputs: Any) -> None:
        """The Trainer's own step or loss is called with `inputs`."""
        if self._given is None:
            return
        same = _same(self._given, inputs)
        self._found = None if same else "changes the inputs of the model"
        self._given = None

    def warn(self) -> None:
        """Say what of the step the Fisher does not follow, if there is anything."""
        if self._found is not None:
            logger.warning(
                "The training_step of %s %s, which the Fisher does not follow: it is of the "
                "examples as the data_collator makes them, read by the model's own loss. Do it in "
                "the collator, in _prepare_inputs or compute_loss, which are followed, or pass "
                "log_likelihood= a function of (model, batch) that returns log p(y|x) of each "
                "example, shape (batch,).",
                self._name,
                self._found,
            )


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one is other
    given = {name: value for name, value in one.items() if isinstance(value, Tensor)}
    if any(name not in other for name in given):
        return False
    return all(_equal(value, other[name]) for name, value in given.items())


def _equal(value: Tensor, other: Any) -> bool:
    if value is other or not isinstance(other, Tensor):
        return value is other
    if value.shape != other.shape:
        return False
    return torch.equal(value.nan_to_num(), other.to(value).nan_to_num())
