"""Functions of torch that are written in Python: what they do is seen, too.

`torch.nn.functional.multi_head_attention_forward` and others hand themselves over as a whole when
torch functions are intercepted. A copy that does not, calls the torch functions in it one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

_DISPATCHERS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def is_composite(func: Callable[..., Any]) -> bool:
    """Whether this is a function of `torch.nn.functional` that can be looked into."""
    return (
        isinstance(func, FunctionType)
        and func.__module__ == "torch.nn.functional"
        and any(name in func.__code__.co_names for name in _DISPATCHERS)
    )


@functools.cache
def opened(func: FunctionType) -> FunctionType:
    """The same code, which does not hand itself over as a whole."""
    names = {**func.__globals__, **dict.fromkeys(_DISPATCHERS, _never)}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*args: object) -> bool:
    return False
