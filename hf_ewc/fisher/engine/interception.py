"""Sees every torch operation of a forward and cuts the uses of the selected parameters.

A `TorchFunctionMode` is called in place of each torch function. Operations that mix a selected
parameter with the batch go to their handler in `operations`, which computes the same output from
the detached parameter and, in the backward, delivers that use's per-example gradients to the
ledger. The autograd graph of the objective then no longer reaches the parameter; if it still does,
an operation was not covered, and `uncovered_uses` names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_ewc.fisher.engine.composite import is_composite, opened
from hf_ewc.fisher.operations import find_handler
from hf_ewc.fisher.unwatched import is_watched
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.graph import leaf_uses, leaves
from hf_ewc.fisher.uses.nested import tensors_in
from hf_ewc.fisher.uses.square_sum import repeats
from hf_ewc.fisher.uses.tracking import Tracker

# Results that depend on the shape or dtype of their arguments alone.
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
_NOTHING = contextlib.nullcontext()
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_SHAPE_ONLY = frozenset(_LIKE | _NEW)
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as"})
# Results that depend on the values of the first argument alone.
_FIRST_ONLY = frozenset({"to", "type_as", "view_as", "expand_as", "reshape_as"})
# Questions about a tensor, most of whose answers are no tensors: every third call of a forward.
_QUESTIONS = frozenset({"__get__", "size", "dim", "numel", "is_floating_point", "stride"})


class Interception(TorchFunctionMode):
    """Active during one batched forward."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._operations: dict[int, str] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not is_watched():
            return func(*args, **(kwargs or {}))
        call = Call(func, getattr(func, "__name__", str(func)), args, kwargs or {})
        if call.name in _SHAPE_ONLY:
            return call.run()
        if call.name in _QUESTIONS and not tensors_in(answer := call.run()):
            return answer
        inputs = tensors_in((args, call.kwargs))
        if call.name in _FIRST_ONLY:
            inputs = inputs[:1]
        shared = [tensor for tensor in inputs if self._tracker.is_shared(tensor)]
        if len(shared) == len(inputs):
            return self._run_shared(call, inputs)
        used = [tensor for tensor in shared if tensor.requires_grad]
        used = used if torch.is_grad_enabled() else []
        if used and is_composite(call.func) and find_handler(call) is None:
            with self:
                return opened(call.func)(*call.args, **call.kwargs)
        result = self._run_covered(call, used) if used else call.run()
        self._tracker.follow_call(call, inputs, tensors_in(result), shared)
        return result

    def _run_shared(self, call: Call, inputs: list[Tensor]) -> Any:
        # Kept out of checkpointing's storage: derived tensors are pulled back after the backward.
        differentiable = any(tensor.requires_grad for tensor in inputs)
        with torch.autograd.graph.saved_tensors_hooks(_keep, _keep) if differentiable else _NOTHING:
            result = _shared_result(call)
        for tensor in tensors_in(call.args[0] if call.name == "__setitem__" else result):
            self._tracker.share(tensor)
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        if call.func is torch.nn.functional.embedding:
            _remember_lookup(self._tracker, result, call)
        elif _is_cast(call, result):
            self._tracker.note_cast(result, call.args[0])
        return result

    def _run_covered(self, call: Call, used: list[Tensor]) -> Any:
        """By the handler, where there is one; as it is otherwise, the operation being noted."""
        ragged = any(tensor.is_nested for tensor in tensors_in((call.args, call.kwargs)))
        handler = None if ragged else find_handler(call)
        if handler is not None:
            with contextlib.suppress(Uncovered):
                return handler(self._tracker, call)
        for tensor in used:
            for leaf in leaves(tensor):
                self._operations.setdefault(id(leaf), call.name)
        return call.run()

    def uncovered_uses(self, objective: Tensor) -> list[tuple[str, str]]:
        """(parameter, operation) of every use that ordinary autograd would still differentiate."""
        ledger = self._tracker.ledger
        return [
            (
                ledger.name_of(leaf),
                self._operations.get(id(leaf), node.removesuffix("Backward0")),
            )
            for leaf, node in leaf_uses(objective)
            if ledger.holds(leaf)
        ]

    def recomputation(self) -> Recomputation:
        """Active while a non-reentrant checkpoint runs a forward again, once for each backward."""
        return Recomputation(self, self._tracker)


class Recomputation:
    """A context that can be entered again: with several backward passes it is."""

    def __init__(self, mode: Interception, tracker: Tracker) -> None:
        self._mode = mode
        self._tracker = tracker
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._tracker.recomputing = True
        self._stack.enter_context(self._mode)

    def __exit__(self, *error: object) -> None:
        try:
            self._stack.close()
        finally:
            self._tracker.recomputing = False


def _is_cast(call: Call, result: Tensor) -> bool:
    if call.name not in _CASTS or not call.args:
        return False
    source = call.args[0]
    return result is not source and result.shape == source.shape


def _remember_lookup(tracker: Tracker, result: Tensor, call: Call) -> None:
    indices, weight, padding = (
        call.argument(i, name) for i, name in enumerate(("input", "weight", "padding_idx"))
    )
    if isinstance(weight, Tensor) and tracker.ledger.holds(weight) and padding is None:
        tracker.lookups.put(result, (weight, indices))


def _shared_result(call: Call) -> Any:
    """What the call returns, where what is repeated for each example is a view of one row."""
    args = call.args
    if call.name == "repeat" and args[0].requires_grad and len(args) > 1:
        return _repeat(*args)
    if call.name == "view" and repeats(args[0]) and not isinstance(args[-1], torch.dtype):
        return args[0].reshape(*args[1:], **call.kwargs)
    return call.run()


def _repeat(tensor: Tensor, *sizes: Any) -> Tensor:
    """tensor.repeat(sizes), repeating along axes of one without copying."""
    counts = list(sizes[0]) if isinstance(sizes[0], (tuple, list)) else list(sizes)
    if tensor.dim() != len(counts):
        return tensor.repeat(*counts)
    shape = zip(tensor.shape, counts, strict=True)
    copied = [1 if size == 1 else count for size, count in shape]
    rest = tensor if all(count == 1 for count in copied) else tensor.repeat(*copied)
    return rest.expand([n * count for n, count in zip(tensor.shape, counts, strict=True)])


def _keep(tensor: Tensor) -> Tensor:
    return tensor
