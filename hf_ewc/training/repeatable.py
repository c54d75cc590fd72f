"""Evaluating a loss again under the same conditions, and leaving everything as it was."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ewc.fisher.untouched import preserved_random_states

# Containers of more entries are data, which no loss changes.
_FEW = 1000
# Whose objects no loss changes, or which are looked after elsewhere.
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("hf_ewc", "torch", "transformers", "accelerate", "datasets", "peft", "trl", "evaluate"),
    *("numpy", "pandas", "tokenizers", "sentence_transformers", "deepspeed", "PIL"),
}


@contextlib.contextmanager
def as_if_not_run(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Whatever a trainer's loss does inside, to itself or the model, is undone: it runs again.

    Such as averages of the weights, counters and queues that a `compute_loss` keeps in the trainer.
    """
    with (
        same_random_numbers([trainer, *model.modules()]),
        same_buffers(model),
        same_attributes(trainer, but_for=model),
        unlogged(trainer),
    ):
        yield


@contextlib.contextmanager
def evaluated_as_if_not_run(trainer: Any, model: nn.Module) -> Iterator[None]:
    """As `as_if_not_run`, in evaluation mode and without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    with as_if_not_run(trainer, model), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def as_before(*owners: Any, but_for: nn.Module) -> Iterator[None]:
    """What a trainer and its collator keep is as before at the end, and what is random.

    Such as counters and averages of a trainer, and a collator's own generator.

    Args:
        owners: whose attributes are put back, as far as they have any.
        but_for: the model, which is not looked into.
    """
    kept = [owner for owner in owners if hasattr(owner, "__dict__")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(same_random_numbers(kept))
        for owner in kept:
            stack.enter_context(same_attributes(owner, but_for))
        yield


@contextlib.contextmanager
def same_attributes(owner: Any, but_for: nn.Module) -> Iterator[None]:
    """What `owner` keeps has its values again at the end: numbers, tensors, modules, containers.

    Args:
        but_for: a module that is not looked into, nor any that wraps it.
    """
    before = dict(vars(owner))
    undo = [put_back for value in before.values() for put_back in _put_back(value, but_for)]
    try:
        yield
    finally:
        with torch.no_grad():
            for put_back in undo:
                put_back()
        for name in vars(owner).keys() - before.keys():
            delattr(owner, name)
        vars(owner).update(before)


def _put_back(
    value: Any, but_for: nn.Module, seen: set[int] | None = None
) -> Iterator[Callable[[], Any]]:
    """What gives a value back what it holds now."""
    seen = set() if seen is None else seen
    if id(value) in seen:  # a tree whose leaves know its root
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        if not any(module is but_for for module in value.modules()):
            for tensor in (*value.parameters(), *value.buffers()):
                yield partial(tensor.detach().copy_, tensor.detach().clone())
    elif isinstance(value, Tensor):
        yield partial(value.detach().copy_, value.detach().clone())
    elif isinstance(value, (list, deque, set, dict)) and len(value) <= _FEW:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _put_back(inner, but_for, seen)
        yield partial(_refill, value, copy.copy(value))
    elif _is_the_users(value):
        before = dict(vars(value))
        for inner in before.values():
            yield from _put_back(inner, but_for, seen)
        yield partial(vars(value).update, before)


def _is_the_users(value: Any) -> bool:
    """Whether a value is a small object of a class of the user's own, such as a running mean."""
    module = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not (
        module in _LIBRARIES
        or isinstance(value, (type, nn.Module))
        or hasattr(value, "__getitem__")
    )


def _refill(value: Any, now: Any) -> None:
    value.clear()
    value.extend(now) if isinstance(value, (list, deque)) else value.update(now)


@contextlib.contextmanager
def same_random_numbers(owners: Iterable[object]) -> Iterator[None]:
    """What is random inside begins as it does outside, and goes on outside as if nothing was.

    That of torch, NumPy and Python, and of generators that `owners` hold as attributes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_random_states())
        held = (getattr(owner, "__dict__", {}) for owner in owners)
        for value in (value for attributes in held for value in attributes.values()):
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
