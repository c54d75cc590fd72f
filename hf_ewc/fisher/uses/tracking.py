"""Sees every torch operation of a forward and cuts the uses of the selected parameters.

A `TorchFunctionMode` is called in place of each torch function. Operations that mix a selected
parameter with the batch go to the handler in `operations`, which computes the same output from the
detached parameter and, in the backward, delivers that use's per-example gradients to the ledger.
The autograd graph of the objective then no longer reaches the parameter; if it still does, an
operation was not covered, and `uncovered_uses` names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_ewc.fisher.uses.account import Site, repeats
from hf_ewc.fisher.uses.graph import leaf_uses, leaves
from hf_ewc.fisher.uses.ledger import Ledger
from hf_ewc.fisher.uses.rows import RowOwners, TensorTable, Uncovered


class Interception(TorchFunctionMode):
    """Active during one batched forward; keeps apart what is shared and what belongs to examples.

    What the batch goes into *carries examples*, batch-major along the first axis (B, or B·k after
    flattening) unless rows were gathered, in which case their `owners` are followed. All other
    tensors, computed from parameters and constants alone, are *shared*.

    Args:
        ledger: where uses are opened.
        inputs: the batch.
        num_examples: B.
    """

    def __init__(self, ledger: Ledger, inputs: Any, num_examples: int) -> None:
        super().__init__()
        self.ledger = ledger
        self.num_examples = num_examples
        self.recomputing = False
        self.lookups = TensorTable()
        # An input that requires a gradient, so that the graph reaches back to the first layer.
        self.root = torch.zeros((), requires_grad=True)
        self._carriers = TensorTable()
        self._derived = TensorTable()
        self._rows = RowOwners(num_examples, self.is_shared)
        self._casts = TensorTable()
        self._operations: dict[int, str] = {}
        for tensor in _tensors(inputs):
            if tensor.dim() == 0 or tensor.shape[0] != 1 or num_examples == 1:
                self._carriers.put(tensor)  # one row for all examples belongs to none

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = _tensors((args, kwargs))
        name = getattr(func, "__name__", str(func))
        if name in _SHAPE_ONLY:
            return func(*args, **kwargs)
        if name in _FIRST_ONLY:
            inputs = inputs[:1]
        shared = [tensor for tensor in inputs if self.is_shared(tensor)]
        if len(shared) == len(inputs):
            return self._run_shared(func, args, kwargs)
        used = [tensor for tensor in shared if tensor.requires_grad]
        if used and torch.is_grad_enabled():
            return self._run_covered(func, name, args, kwargs, inputs, used)
        return self._run_batched(func, name, args, kwargs, inputs)

    def _run_shared(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Kept out of checkpointing's storage: derived tensors are pulled back after the backward.
        name = getattr(func, "__name__", "")
        with torch.autograd.graph.saved_tensors_hooks(_keep, _keep):
            result = _shared_result(func, name, args, kwargs)
        for tensor in _tensors(args[0] if name == "__setitem__" else result):
            self.share(tensor)
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        if func is torch.nn.functional.embedding:
            _remember_lookup(self, result, args, kwargs)
        elif name in _CASTS and result is not args[0] and result.shape == args[0].shape:
            self._casts.put(result, args[0])
        return result

    def _run_covered(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        used: list[Tensor],
    ) -> Any:
        from hf_ewc.fisher.operations import find_handler

        handler = find_handler(func, name)
        if handler is not None:
            try:
                result = handler(self, func, args, kwargs)
            except Uncovered:
                pass
            else:
                return self._carry(name, args, inputs, result)
        for tensor in used:
            for leaf in leaves(tensor):
                self._operations.setdefault(id(leaf), name)
        return self._run_batched(func, name, args, kwargs, inputs)

    def _run_batched(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
    ) -> Any:
        return self._carry(name, args, inputs, func(*args, **kwargs))

    def _carry(self, name: str, args: tuple[Any, ...], inputs: list[Tensor], result: Any) -> Any:
        """Note that the results carry examples, and of which example each row is."""
        for tensor in _tensors(result):
            if not self._derived.get(tensor):
                self._carriers.put(tensor)
        if name == "__setitem__":
            self._carriers.put(args[0])
        self._rows.follow(name, args, inputs, result)
        return result

    # Which example a row belongs to

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on parameters and constants alone.

        What requires a gradient and was not seen to be computed may hide examples, unless it is a
        parameter, which a model may also make of another in its forward.
        """
        if self._carriers.get(tensor):
            return False
        known = not tensor.requires_grad or self._derived.get(tensor)
        return bool(known or isinstance(tensor, nn.Parameter) or self._came_through(tensor))

    def _came_through(self, tensor: Tensor) -> bool:
        """Whether this was computed from parameters and then went through a function unseen.

        FSDP2 and DeepSpeed send what modules take and return through autograd functions of theirs.
        """
        found = _near_leaves(tensor)
        shared = bool(found) and all(isinstance(leaf, nn.Parameter) for leaf in found)
        (self._derived if shared else self._carriers).put(tensor)
        return shared

    def is_used(self, value: Any) -> bool:
        """Whether `value` is a selected parameter, or derived from one, and not yet batched."""
        return isinstance(value, Tensor) and value.requires_grad and self.is_shared(value)

    def gathered_owners(self, tensor: Tensor) -> Tensor | None:
        """The example of each row (R,) where rows were gathered, None where they are in order."""
        return self._rows.gathered(tensor)

    def owners(self, tensor: Tensor) -> Tensor:
        """The example of each row along the first axis, (R,)."""
        return self._rows.of(tensor)

    def rows_per_example(self, tensor: Tensor) -> int:
        """k for a tensor of B·k rows; `Uncovered` where the rows are no multiple of B."""
        return self._rows.per_example(tensor)

    def per_example(self, tensor: Tensor) -> Tensor:
        """View B·k rows of vectors, (B·k, …, D), as (B, T, D)."""
        self.rows_per_example(tensor)
        return tensor.reshape(self.num_examples, -1, tensor.shape[-1])

    # Uses

    def open(self, tensor: Tensor) -> Site | None:
        """A site for this use; None while a checkpoint recomputes (its first run opened it).

        A cast has the identity as Jacobian, so its use is a use of what was cast.
        """
        return None if self.recomputing else self.ledger.open(self._before_casts(tensor))

    def is_direct(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter, or a view or cast of one."""
        return self.ledger.is_direct(self._before_casts(tensor))

    def _before_casts(self, tensor: Tensor) -> Tensor:
        while (source := self._casts.get(tensor)) is not None:
            tensor = source
        return tensor

    def share(self, tensor: Tensor) -> Tensor:
        """Declare that a tensor was computed from parameters and constants alone."""
        if tensor.requires_grad and not self._carriers.get(tensor):
            self._derived.put(tensor)
        return tensor

    def follow(self, target: Tensor, source: Tensor) -> Tensor:
        """Declare that `target`, computed in a handler, carries the examples of `source`'s rows."""
        self._carriers.put(target)
        self._rows.copy(target, source)
        return target

    def uncovered_uses(self, objective: Tensor) -> list[tuple[str, str]]:
        """(parameter, operation) of every use that ordinary autograd would still differentiate."""
        uses = []
        for leaf, node in leaf_uses(objective):
            if self.ledger.holds(leaf):
                operation = self._operations.get(id(leaf), node.removesuffix("Backward0"))
                uses.append((self.ledger.name_of(leaf), operation))
        return uses

    def recomputation(self) -> Recomputation:
        """Active while a non-reentrant checkpoint runs a forward again, once for each backward."""
        return Recomputation(self)


class Recomputation:
    """A context that can be entered again: with several backward passes it is."""

    def __init__(self, mode: Interception) -> None:
        self._mode = mode
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._mode.recomputing = True
        self._stack.enter_context(self._mode)

    def __exit__(self, *error: object) -> None:
        try:
            self._stack.close()
        finally:
            self._mode.recomputing = False


def _near_leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves of a small autograd graph; none where it is large, as what carries examples has.

    That was built on `Interception.root`, which is a leaf and no parameter.
    """
    found: list[Tensor] = []
    seen = {tensor.grad_fn}
    stack = [tensor.grad_fn]
    while stack and len(seen) < _SMALL_GRAPH:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                found.append(leaf)
            elif following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return [] if stack else found


def _remember_lookup(
    context: Interception, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
    indices = args[0] if args else kwargs.get("input")
    if isinstance(weight, Tensor) and context.ledger.holds(weight) and padding is None:
        context.lookups.put(result, (weight, indices))


def _shared_result(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """func(*args), where what is repeated for each example is a view of one row."""
    if name == "repeat" and args[0].requires_grad and len(args) > 1:
        return _repeat(*args)
    if name == "view" and repeats(args[0]) and not isinstance(args[-1], torch.dtype):
        return args[0].reshape(*args[1:], **kwargs)
    return func(*args, **kwargs)


def _repeat(tensor: Tensor, *sizes: Any) -> Tensor:
    """tensor.repeat(sizes), repeating along a leading axis of one without copying."""
    counts = list(sizes[0]) if isinstance(sizes[0], (tuple, list)) else list(sizes)
    if tensor.dim() == len(counts) > 1 and tensor.shape[0] == 1:
        rest = tensor if all(n == 1 for n in counts[1:]) else tensor.repeat(1, *counts[1:])
        return rest.expand(counts[0], *rest.shape[1:])
    return tensor.repeat(*counts)


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


# Nodes of a graph up to which it is searched for what it was built on.
_SMALL_GRAPH = 64
# Results that depend on the shape or dtype of their arguments alone.
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_SHAPE_ONLY = frozenset(_LIKE | _NEW)
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as"})
# Results that depend on the values of the first argument alone.
_FIRST_ONLY = frozenset({"to", "type_as", "view_as", "expand_as", "reshape_as"})
