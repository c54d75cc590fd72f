"""Trainers whose subclass has a training loop of its own, which may call no `training_step`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_LOOPS = ("train", "_inner_training_loop")
# Whose loops call `training_step`.
_LIBRARIES = ("transformers", "hf_ewc")


def has_own_loop(kind: type) -> bool:
    """Whether a class of a trainer's, beside the Trainer's and this package's, has a loop."""
    outside = (c for c in kind.mro() if c.__module__.partition(".")[0] not in _LIBRARIES)
    return any(name in vars(c) for c in outside for name in _LOOPS)


def watch_train(kind: type, around: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Let `kind.train` run inside `around(trainer)`, once."""
    train: Any = getattr(kind, "train")  # noqa: B009 (of any class)
    if getattr(train, "is_watched", False):
        return

    @functools.wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around(self):
            return train(self, *args, **kwargs)

    watched.is_watched = True  # type: ignore[attr-defined]
    setattr(kind, "train", watched)  # noqa: B010


def holds_any(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether `optimizer` steps any of these."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in own for p in parameters)
