"""Leaves a model exactly as it was found, whatever ends the estimate."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Result = TypeVar("Result")

# One estimate at a time: they change the modes, flags and gradients of their model, torch's random
# numbers and the hooks of the process, and would take each other's for what they found. The thread
# whose turn it is stands under "thread": unlike a lock, that can be looked up after an interrupt.
_turn: dict[str, int] = {}
_under_estimate: set[int] = set()
_LOOK_AGAIN_AFTER = 0.01  # seconds


def in_turn(model: nn.Module, action: Callable[[], Result]) -> Result:
    """action(), an estimate on `model`, after those of other threads.

    Raises:
        RuntimeError: this thread is estimating on the model already.
    """
    nested = _turn.get("thread") == threading.get_ident()
    if nested and id(model) in _under_estimate:
        raise RuntimeError(
            f"The Fisher of this {type(model).__name__} is being estimated already, and what that "
            "runs (a log_likelihood, a collator or a hook) asks for it again."
        )
    try:
        try:
            _wait_for_turn()
            return action()
        finally:
            _end_turn(nested)
    finally:
        _end_turn(nested)


def _wait_for_turn() -> None:
    while _turn.setdefault("thread", threading.get_ident()) != threading.get_ident():
        time.sleep(_LOOK_AGAIN_AFTER)


def _end_turn(nested: bool) -> None:
    if not nested and _turn.get("thread") == threading.get_ident():
        del _turn["thread"]


def untouched(
    model: nn.Module, selected: Mapping[str, nn.Parameter], action: Callable[[], Result]
) -> Result:
    """action() in eval mode, not compiled, with a gradient for `selected` alone; all put back.

    Kept: parameters (the values of those that a forward writes to), `.grad` (set aside, not
    written to), `requires_grad`, the mode and other attributes of each module, buffers,
    configurations, hooks, and the random states of Python, NumPy and torch. A Ctrl-C at any moment
    leaves nothing changed: until the snapshot is there nothing is, and what puts it back is not
    interrupted by signals, and else begun again.
    """
    snapshot = Snapshot(model)
    try:
        try:
            snapshot.set_up(selected)
            with torch.inference_mode(False), torch.enable_grad():
                return action()
        finally:
            snapshot.put_back()
    finally:
        snapshot.put_back()


class Snapshot:
    """What an estimate may change, as it was; making one only reads."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._done = False
        self._interrupted = False
        self._handler = signal.getsignal(signal.SIGINT)
        self._grad_enabled = torch.is_grad_enabled()
        self._function_modes = torch._C._len_torch_function_stack()
        self._random = _RandomStates()
        self._modes = [(module, module.training) for module in model.modules()]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._buffers = [
            (module, name, buffer, None if buffer is None else (buffer._version, buffer.clone()))
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._renormalized = [
            (weight, weight._version, weight.detach().clone()) for weight in _renormalized(model)
        ]
        self._owners = [(owner, _public(owner)) for owner in _with_attributes(model)]
        self._hooks = [(hooks, set(hooks)) for hooks in _hooks_of(model)]
        self._compiled = [
            (module, call)
            for module in model.modules()
            if (call := getattr(module, "_compiled_call_impl", None)) is not None
        ]

    def set_up(self, selected: Mapping[str, nn.Parameter]) -> None:
        """Eval mode, no caches of keys and values, gradients for the `selected` alone.

        Caches cost memory, and a recomputed layer would write them twice.
        """
        _under_estimate.add(id(self._model))
        self._model.eval()
        for module, _ in self._compiled:  # what intercepts operations would be compiled, too
            module._compiled_call_impl = None
        chosen = {id(parameter) for parameter in selected.values()}
        for parameter, _, _ in self._parameters:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        for owner, settings in self._owners:
            if settings.get("use_cache") is True and not isinstance(owner, nn.Module):
                owner.use_cache = False

    def put_back(self) -> None:
        """Once, and where it was interrupted again from the start."""
        if self._done:
            return
        with self._deferred_signals():
            while torch._C._len_torch_function_stack() > self._function_modes:
                torch._C._pop_torch_function_stack()
            self._put_back_parameters()
            self._put_back_buffers()
            for owner, attributes in self._owners:
                _put_back(owner, attributes)
            for module, training in self._modes:
                module.training = training
            self._remove_hooks()
            for module, call in self._compiled:
                module._compiled_call_impl = call
            self._random.put_back()
            torch.set_grad_enabled(self._grad_enabled)
            _under_estimate.discard(id(self._model))
        self._done = True
        if self._interrupted and callable(self._handler):
            self._handler(signal.SIGINT, None)

    @contextlib.contextmanager
    def _deferred_signals(self) -> Iterator[None]:
        """A Ctrl-C is noted and acted upon afterwards; other threads get none."""
        if threading.current_thread() is not threading.main_thread() or self._handler is None:
            yield
            return
        signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._handler)

    def _note_interrupt(self, *signal_and_frame: Any) -> None:
        self._interrupted = True

    def _put_back_parameters(self) -> None:
        for parameter, required, gradient in self._parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        with torch.no_grad():
            for weight, version, values in self._renormalized:
                if weight._version != version:
                    weight.copy_(values)

    @torch.no_grad()
    def _put_back_buffers(self) -> None:
        for module, name, buffer, saved in self._buffers:
            module._buffers[name] = buffer
            if isinstance(buffer, Tensor) and saved is not None:
                version, values = saved
                if buffer._version != version or not torch.equal(buffer, values):
                    buffer.copy_(values)

    def _remove_hooks(self) -> None:
        """Those that an estimate has made: what a model installs in its first forward stays."""
        before = {id(hooks): keys for hooks, keys in self._hooks}
        for hooks in _hooks_of(self._model):
            for key in hooks.keys() - before.get(id(hooks), set()):
                if (getattr(hooks[key], "__module__", None) or "").startswith("hf_ewc."):
                    del hooks[key]


@contextlib.contextmanager
def preserved_random_states() -> Iterator[None]:
    """What is drawn inside is as if it had not been."""
    states = _RandomStates()
    try:
        yield
    finally:
        states.put_back()


class _RandomStates:
    """Of Python, NumPy and torch, on the CPU and on all accelerators."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 (what data sets use)
        self._cpu = torch.get_rng_state()
        self._devices: list[tuple[torch.device, Tensor]] = []
        accelerator = torch.accelerator
        if accelerator.is_available():
            kind: Any = accelerator.current_accelerator()
            found = [torch.device(kind.type, i) for i in range(accelerator.device_count())]
            self._devices = [(d, _module_of(d).get_rng_state(d)) for d in found]

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _module_of(device).set_rng_state(state, device)


def _module_of(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _with_attributes(model: nn.Module) -> list[Any]:
    """The modules, which note things in a forward such as the longest sequence, and the configs."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
    return [*modules, *(c for c in configs.values() if hasattr(c, "__dict__"))]


def _renormalized(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that a forward writes to: of embeddings with `max_norm`, and their adapters'."""
    for module in model.modules():
        inner = getattr(module, "base_layer", module)
        if isinstance(inner, (nn.Embedding, nn.EmbeddingBag)) and inner.max_norm is not None:
            yield from module.parameters()


def _public(owner: object) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def _put_back(owner: object, before: dict[str, Any]) -> None:
    now = _public(owner)
    for name in now.keys() - before.keys():
        delattr(owner, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)


def _hooks_of(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_pre_hooks
    for parameter in model.parameters():
        yield from filter(None, (parameter._backward_hooks, parameter._post_accumulate_grad_hooks))
