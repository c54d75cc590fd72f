"""A trial of `Trainer.hyperparameter_search`, in which settings of EWC may be searched, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import Trainer

from hf_ewc.config import EWCConfig
from hf_ewc.training.once_per_step import replaced

_OF_EWC = frozenset(each.name for each in fields(EWCConfig))


@contextmanager
def without_ewc_settings(trainer: Trainer, trial: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Inside, the Trainer finds in a trial what is a training argument alone.

    Yields:
        What to hand to the Trainer for the trial, and what it says of fields of `EWCConfig`, which
        are there at the end: Optuna's are drawn by the Trainer, by its `hp_space`.
    """
    found: dict[str, Any] = {}

    def others(params: Mapping[str, Any]) -> dict[str, Any]:
        found.update({name: value for name, value in params.items() if name in _OF_EWC})
        return {name: value for name, value in params.items() if name not in _OF_EWC}

    if isinstance(trial, Mapping):
        yield others(trial), found
        return
    with replaced(trainer, "hp_space", lambda space: lambda drawn: others(space(drawn))):
        yield trial, found
