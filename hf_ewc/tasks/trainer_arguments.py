"""Arguments that `run_tasks` hands to the trainer's constructor: whether it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from hf_ewc.config import EWCConfig
from hf_ewc.tasks.sequence_config import SequenceConfig

_BY_TASK = ("train_dataset", "eval_dataset")
_LIBRARIES = ("hf_ewc", "transformers", "trl")  # whose constructors take nothing unnamed


def check_trainer_arguments(
    trainer_class: type[Any], names: Iterable[str], owner: str, own: Iterable[str] = ()
) -> None:
    """Refuse names that the trainer's constructor does not take, before anything is trained.

    Args:
        owner: who gave them, for the message.
        own: further names that the owner takes itself, among which a misspelt one may be.

    Raises:
        TypeError: with the name, and what it may have been meant to be.
    """
    known = constructor_arguments(trainer_class)
    settings = [each.name for kind in (EWCConfig, SequenceConfig) for each in fields(kind)]
    for name in names:
        if name in _BY_TASK:
            raise TypeError(f"{owner} sets {name!r}, which comes from each task.")
        if known is None or name in known:
            continue
        close = get_close_matches(name, {*known, *settings, *own}, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise TypeError(
            f"{owner} sets {name!r}, which is no setting and no argument of "
            f"{trainer_class.__name__}{hint}"
        )


def constructor_arguments(trainer_class: type[Any]) -> set[str] | None:
    """The names that the constructor takes; None where it may take any.

    A constructor that takes `**kwargs` hands them to the next class. One of somebody else's may
    keep some for itself.
    """
    found: set[str] = set()
    for one in trainer_class.__mro__:
        if "__init__" not in vars(one) or one is object:
            continue
        parameters = inspect.signature(vars(one)["__init__"]).parameters.values()
        found |= {each.name for each in parameters}
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            return found
        if one.__module__.split(".")[0] not in _LIBRARIES:
            return None
    return None
