"""Which handler covers which torch function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.uses.account import Site
from hf_ewc.fisher.uses.call import Call
from hf_ewc.fisher.uses.tracking import Tracker

# Called in place of a torch function: returns the same output, with the uses of selected parameters
# cut from the graph and opened in the ledger; raises `Uncovered` where it cannot.
Handler = Callable[[Tracker, Call], Any]
_HANDLERS: dict[str, Handler] = {}


def covers(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler under the names of the torch functions that it covers."""

    def register(handler: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = handler
        return handler

    return register


def find_handler(func: Callable[..., Any], name: str) -> Handler | None:
    """The handler of a torch function; functions from elsewhere are never covered by name."""
    module = getattr(func, "__module__", None) or "torch"
    if module.split(".")[0] not in ("torch", "_operator", "transformers"):
        return None
    return _HANDLERS.get(name.rsplit(".", 1)[-1])


def sum_rows_by_example(tracker: Tracker, rows: Tensor, owners: Tensor | None) -> Tensor:
    """(B·k, …, D) → (B, D), each example's rows summed, in fp32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if owners is None:
        return rows.reshape(tracker.num_examples, -1, rows.shape[-1]).sum(1, dtype=dtype)
    sums = rows.new_zeros(tracker.num_examples, rows.shape[-1], dtype=dtype)
    return sums.index_add_(0, owners, rows.reshape(-1, rows.shape[-1]).to(dtype))


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def open_if_used(tracker: Tracker, value: Any) -> Site | None:
    return tracker.open(value) if isinstance(value, Tensor) and value.requires_grad else None


def unviewed(output: Tensor) -> Tensor:
    """The output of an autograd function as no view, so that a model may write to it in place."""
    whole: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return whole
