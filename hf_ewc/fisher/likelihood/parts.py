"""What the parts of a model returned in one forward, given back in the next.

A forward with other labels does the same up to its loss: where a part is called with what it was
called with before, it need not be run again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ewc.fisher.uses.nested import tensors_in

_SIMPLE = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device)
# Of one part in one forward.
_MOST_CALLS = 8
_Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Call:
    """One call of a part: its arguments and its result, and how often each had been written to."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any
    versions: list[int]
    has_graph: bool

    def answers(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        """Whether a call with these arguments would come to this result, as it is now."""
        return (
            self.has_graph >= torch.is_grad_enabled()
            and _same(arguments, self.arguments)
            and _versions((*self.arguments, self.result)) == self.versions
        )


class Parts:
    """The modules that a model's own forward calls.

    Args:
        modules: those; with none, every forward is run in full.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = list(modules)
        self._calls: dict[int, list[_Call]] = {}
        self._noted: list[list[int]] = []

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """Those directly inside of the model, of a PEFT model of the one that it adapts."""
        get_base_model = getattr(model, "get_base_model", None)
        return cls(_directly_inside(get_base_model() if callable(get_base_model) else model))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what the parts return in here, and forget what they did before."""
        self.forget()

        def note(calls: list[_Call], forward: _Forward, *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            if len(calls) < _MOST_CALLS:
                arguments = args, kwargs
                versions = _versions((*arguments, result))
                calls.append(_Call(arguments, result, versions, torch.is_grad_enabled()))
            return result

        with self._instead(note):
            yield
        self._noted = self._versions_now()

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        """Give back what was noted of a part's n-th call where that has the same arguments.

        Of that call alone: the result of another may be written to after this one.
        """
        made: dict[int, int] = {}

        def repeat(calls: list[_Call], forward: _Forward, *args: Any, **kwargs: Any) -> Any:
            number = made[id(calls)] = made.get(id(calls), -1) + 1
            if number < len(calls) and calls[number].answers((args, kwargs)):
                return calls[number].result
            return forward(*args, **kwargs)

        with self._instead(repeat):
            yield

    def are_as_noted(self) -> bool:
        """Whether nobody has written to a result since the forward that was noted."""
        return self._versions_now() == self._noted

    def _versions_now(self) -> list[list[int]]:
        return [_versions(call.result) for calls in self._calls.values() for call in calls]

    def forget(self) -> None:
        self._calls = {id(module): [] for module in self._modules}

    @contextlib.contextmanager
    def _instead(self, way: Callable[..., Any]) -> Iterator[None]:
        """Inside, `way` is called with a part's calls, its forward and the arguments."""
        own = [(module, vars(module).get("forward")) for module in self._modules]
        try:
            for module, _ in own:
                forward = module.forward
                around = functools.partial(way, self._calls.get(id(module), []), forward)
                module.forward = functools.wraps(forward)(around)
            yield
        finally:
            for module, before in own:
                if before is not None:
                    module.forward = before
                else:
                    vars(module).pop("forward", None)


def _directly_inside(model: nn.Module) -> Iterator[nn.Module]:
    """Children, and those of lists of modules, which are not called themselves."""
    for child in dict.fromkeys(model.children()):
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _directly_inside(child)
        elif not isinstance(child, torch.jit.ScriptModule):
            yield child


def _versions(value: Any) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors_in(value)]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        return alike and torch.equal(one, other)
    if isinstance(one, _SIMPLE):
        return type(one) is type(other) and bool(one == other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return False
