"""Leaves a model exactly as it was found."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def untouched(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, with a gradient for the `selected` parameters alone; all put back at the end.

    Kept: parameters, `.grad` (set aside, not written to), `requires_grad`, the mode and other
    attributes of each module, buffers, configurations, and the random states of Python, NumPy and
    torch.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_random_states())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_buffers(model))
        stack.enter_context(_attributes(model))
        stack.enter_context(_modes(model))
        stack.enter_context(_gradients(model, selected))
        stack.enter_context(_no_cache(model))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def preserved_random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what data sets use)
    try:
        with torch.random.fork_rng(device_type=_accelerator_type()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _accelerator_type() -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if device is None else device.type


@contextlib.contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    before = [
        (module, name, buffer, None if buffer is None else (buffer._version, buffer.clone()))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, name, buffer, saved in before:
            module._buffers[name] = buffer
            if isinstance(buffer, Tensor) and saved is not None:
                version, values = saved
                if buffer._version != version or not torch.equal(buffer, values):
                    with torch.no_grad():
                        buffer.copy_(values)


@contextlib.contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """What modules note for themselves in a forward, such as the longest sequence so far."""
    owners = [
        module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    before = [(module, _public(module)) for module in owners]
    try:
        yield
    finally:
        for module, attributes in before:
            _put_back(module, attributes)


def _public(owner: object) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def _put_back(owner: object, before: dict[str, Any]) -> None:
    now = _public(owner)
    for name in now.keys() - before.keys():
        delattr(owner, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)


@contextlib.contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _gradients(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> Iterator[None]:
    chosen = {id(parameter) for parameter in selected.values()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Key-value caches off: they cost memory, and a recomputed layer would write them twice.

    What a forward notes in a configuration, such as the type of the problem, is put back, too.
    """
    found = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    before = [(config, _public(config)) for config in found.values() if hasattr(config, "__dict__")]
    for config, settings in before:
        if settings.get("use_cache") is True:
            config.use_cache = False
    try:
        yield
    finally:
        for config, settings in before:
            _put_back(config, settings)
