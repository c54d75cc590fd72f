"""Evaluating a loss again under the same conditions, and leaving everything as it was."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ewc.fisher.untouched import preserved_random_states


@contextlib.contextmanager
def same_random_numbers(owners: Iterable[object]) -> Iterator[None]:
    """What is random inside begins as it does outside, and goes on outside as if nothing was.

    That of torch, NumPy and Python, and of generators that `owners` hold as attributes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_random_states())
        for value in (value for owner in owners for value in vars(owner).values()):
            if isinstance(value, torch.Generator):
                stack.callback(value.set_state, value.get_state())
            elif isinstance(value, np.random.Generator):
                stack.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
            elif isinstance(value, random.Random):
                stack.callback(value.setstate, value.getstate())
        yield


@contextlib.contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """The model's buffers, such as running means, have their values again at the end."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextlib.contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """What a loss logs inside is not logged: it is computed again."""
    own = vars(trainer).get("log")
    trainer.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del trainer.log
        if own is not None:
            trainer.log = own


def copied(inputs: Mapping[str, Any]) -> Any:
    """Inputs of the same type with tensors of their own, for a loss that changes them."""
    made: Any = copy.copy(inputs)
    if isinstance(made, MutableMapping):
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                made[name] = value.clone()
    return made
