"""Which handler covers which torch function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.uses.call import Call
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker

# Called in place of a torch function: returns the same output, with the uses of selected parameters
# cut from the graph and opened in the ledger; raises `Uncovered` where it cannot.
Handler = Callable[[Tracker, Call], Any]
_BY_NAME: dict[str, Handler] = {}
_BY_FUNCTION: dict[Any, Handler] = {}
# Modules whose functions are covered by name, and the namespaces of operators that are.
_MODULES = ("torch", "_operator", "transformers")
_NAMESPACES = ("torch._ops.aten", "torch._ops.transformers")


def covers(*functions: str | Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions by their names, or for functions of your own.

    A function of your own is covered where torch dispatches it: an operator of `torch.library`, or
    what `torch.overrides.wrap_torch_function` wraps. Other functions need no handler, since the
    torch functions in them are seen. Say `mylib::gate(x, scale)` multiplies x (B, T, D) by a learnt
    scale (D,) and broadcasts as torch does. Given a copy of the scale for each example, its own
    backward returns a gradient for each:

    >>> from hf_ewc.fisher.operations import batched, covers
    >>> @covers(torch.ops.mylib.gate)
    ... def gate(tracker, call):
    ...     x, scale = call.args
    ...     return call.func(x, batched(tracker, scale, x))

    A handler may also spell the operation in others (`linear`), or raise `Uncovered`, upon which
    the operation runs as it is. That it kept examples apart is checked as for all others.
    """

    def register(handler: Handler) -> Handler:
        for function in functions:
            if isinstance(function, str):
                _BY_NAME[function] = handler
            else:
                _BY_FUNCTION[_operator(function)] = handler
        return handler

    return register


def find_handler(call: Call) -> Handler | None:
    """The handler of a function; of functions from elsewhere than torch, none by name."""
    own = _BY_FUNCTION.get(_operator(call.func))
    if own is not None:
        return own
    module = getattr(call.func, "__module__", None) or "torch"
    if module.startswith("torch._ops.") and module not in _NAMESPACES:
        return None
    if module.split(".")[0] not in _MODULES:
        return None
    return _BY_NAME.get(call.name.split(".")[0])


def _operator(function: Any) -> Any:
    """The operator of an overload, or of the function that `torch.library` made one."""
    function = getattr(function, "_opoverload", function)
    return getattr(function, "overloadpacket", function)


def sum_rows_by_example(tracker: Tracker, rows: Tensor, owners: Tensor | None) -> Tensor:
    """(B·k, …, D) → (B, D), each example's rows summed, in fp32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if owners is None:
        return rows.reshape(tracker.num_examples, -1, rows.shape[-1]).sum(1, dtype=dtype)
    sums = rows.new_zeros(tracker.num_examples, rows.shape[-1], dtype=dtype)
    return sums.index_add_(0, owners, rows.reshape(-1, rows.shape[-1]).to(dtype))


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def open_if_used(tracker: Tracker, value: Any) -> Use | None:
    return tracker.open(value) if isinstance(value, Tensor) and value.requires_grad else None


def unviewed(output: Tensor) -> Tensor:
    """The output of an autograd function as no view, so that a model may write to it in place."""
    whole: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return whole
