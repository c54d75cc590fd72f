"""Of which example each row of a tensor is.

Rows are in order along the first axis, row r of B·k belonging to example r // k, until an
operation moves them: to another axis (time-first layouts), into one row (packed images), or by
indices that depend on the data (mixtures of experts). From there on the owners of the elements are
followed; where they cannot be, they are unknown, and a parameter that meets such rows is not
covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.combination import combined
from hf_ewc.fisher.uses.owners import MOVEMENTS, by_index, moved, reduced, varying, written
from hf_ewc.fisher.uses.table import TensorTable

_UNKNOWN = object()
# How many come out, and whose, depends on the data in other ways than being picked.
# What cannot be followed, or what a function refuses of owners that it takes of values.
_UNFOLLOWED = (Uncovered, RuntimeError, IndexError, TypeError, ValueError)
_MIXING = frozenset({"unique", "unique_consecutive"})
_SORTING = frozenset({"sort", "argsort", "topk"})
# What is written into the first argument.
_WRITERS = ("index_add", "index_copy", "index_put", "index_fill", "masked_scatter", "scatter")
_SCATTERS = ("scatter_add", "scatter_reduce")
_IN_PLACE = {name + "_" for name in (*_WRITERS, *_SCATTERS, "copy")}
_WRITING = {"__setitem__", *_WRITERS, *_SCATTERS} | _IN_PLACE
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
# The result's rows are those of the first argument.
_LIKE_FIRST = frozenset(_WRITING | _GROUPED)


class RowOwners:
    """The owners of what is not in order along the first axis; all other tensors are.

    Args:
        num_examples: B.
        is_shared: whether a tensor depends on no example.
    """

    def __init__(self, num_examples: int, is_shared: Callable[[Tensor], bool]) -> None:
        self._num_examples = num_examples
        self._is_shared = is_shared
        self._table = TensorTable()  # owners, see `hf_ewc.fisher.uses.owners`, or _UNKNOWN

    def elements(self, tensor: Tensor) -> Tensor | None:
        """The owners of the elements, broadcast; None where they are in order."""
        owners = self._table.get(tensor)
        if owners is _UNKNOWN:
            raise Uncovered
        found: Tensor | None = owners
        return found

    def gathered(self, tensor: Tensor) -> Tensor | None:
        """The example of each row (R,) where rows were gathered, None where they are in order."""
        owners = self.elements(tensor)
        if owners is None:
            return None
        if tensor.dim() == 0 or any(axis > 0 for axis in varying(owners)):
            raise Uncovered
        return owners.flatten().expand(tensor.shape[0])

    def of(self, tensor: Tensor) -> Tensor:
        """The example of each row along the first axis, (R,)."""
        gathered = self.gathered(tensor)
        if gathered is not None:
            return gathered
        return self._in_order(self.per_example(tensor), tensor.device)

    def of_elements(self, tensor: Tensor) -> Tensor:
        """As `elements`, also where rows are in order."""
        owners = self.elements(tensor)
        if owners is None:
            owners = self.of(tensor).reshape(-1, *[1] * (tensor.dim() - 1))
        return owners

    def per_example(self, tensor: Tensor) -> int:
        """k for a tensor of B·k rows; `Uncovered` where the rows are no multiple of B."""
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows == 0 or rows % self._num_examples:
            raise Uncovered
        return rows // self._num_examples

    def copy(self, target: Tensor, source: Tensor) -> None:
        """The rows of `target` are those of `source`."""
        self._put(target, self._table.get(source))

    def follow_writing(self, call: Call) -> None:
        """Note of whom the elements of what was blank are, after values were written into it."""
        target, index, value = call.args
        if not isinstance(value, Tensor) or self._is_shared(value):
            return
        try:
            owners = self.of_elements(value)
            self._put(target, written(target.shape, index, owners, self._num_examples))
        except _UNFOLLOWED:
            return

    def follow(self, call: Call, inputs: list[Tensor], outputs: Sequence[Tensor]) -> None:
        """Note the owners of what a function returned."""
        name = call.name
        if name in _MIXING:
            self._forget(outputs)
        elif name in _SORTING:
            self._follow_sort(call, outputs)
        elif name in MOVEMENTS and not (name == "where" and len(inputs) > 1):
            self._follow_movement(call, inputs, outputs)
        elif self._table and name in _LIKE_FIRST:
            for output in outputs:
                self.copy(output, call.args[0])
        elif self._table:
            self._follow_combination(call, inputs, outputs)

    def _follow_movement(self, call: Call, inputs: list[Tensor], outputs: Sequence[Tensor]) -> None:
        sources = inputs if isinstance(call.argument(0, "tensors"), (tuple, list)) else inputs[:1]
        carriers = [source for source in sources if not self._is_shared(source)]
        if not outputs:
            return
        if not carriers:
            self._follow_indices(call, inputs[1:], outputs[0])
            return
        known = any(self._table.get(source) is not None for source in carriers)
        if not known and keeps_first_axis(call, carriers[0], outputs[0], self._num_examples):
            return
        try:
            if len(carriers) < len(sources):
                self._put(outputs[0], combined(call, carriers, self._all(carriers), outputs[0]))
                return
            found = moved(call, carriers, self._all(carriers), outputs)
        except _UNFOLLOWED:
            self._forget(outputs)
            return
        for output, owners in zip(outputs, found, strict=True):
            self._put(output, owners)

    def _follow_indices(self, call: Call, inputs: list[Tensor], output: Tensor) -> None:
        """What was picked from a shared tensor belongs to whom the indices belong."""
        carriers = [tensor for tensor in inputs if not self._is_shared(tensor)]
        if call.name not in ("__getitem__", "index_select", "repeat_interleave"):
            self._follow_combination(call, carriers, [output])
        elif carriers:
            try:
                self._put(output, by_index(call, carriers, self._all(carriers), output.dim()))
            except _UNFOLLOWED:
                self._table.put(output, _UNKNOWN)

    def _follow_combination(
        self, call: Call, inputs: list[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        carriers = [tensor for tensor in inputs if self._has_rows(tensor)]
        if all(self._table.get(tensor) is None for tensor in carriers):
            return
        for output in outputs:
            try:
                self._put(output, combined(call, carriers, self._all(carriers), output))
            except _UNFOLLOWED:
                self._table.put(output, _UNKNOWN)

    def _has_rows(self, tensor: Tensor) -> bool:
        """Whether it belongs to examples; what was reduced to one number does not count."""
        known = tensor.dim() > 0 or isinstance(self._table.get(tensor), Tensor)
        return known and not self._is_shared(tensor)

    def _follow_sort(self, call: Call, outputs: Sequence[Tensor]) -> None:
        """What is sorted within examples stays theirs; indices across them are of no example."""
        source = call.argument(0, "input")
        if source.dim() > 1 and self._table.get(source) is None:
            return
        self._forget(outputs)
        try:
            owners = self.of_elements(source)
            axis = call.argument(2 if call.name == "topk" else 1, "dim", -1) % source.dim()
            if owners.shape[axis] == 1:
                for output in outputs:
                    self._put(output, owners)
            elif source.dim() == 1 and len(outputs) == 2:
                self._put(outputs[0], owners[outputs[1]])
        except _UNFOLLOWED:
            return

    def _all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.of_elements(tensor) for tensor in tensors]

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._table.put(tensor, _UNKNOWN)

    def _put(self, tensor: Tensor, owners: Any) -> None:
        if isinstance(owners, Tensor):
            owners = reduced(owners)
            fits = zip(owners.shape, tensor.shape, strict=False)
            if owners.dim() != tensor.dim() or any(n not in (1, size) for n, size in fits):
                owners = _UNKNOWN
            elif tensor.dim() and self._ordered(owners):
                owners = None
        if owners is None:
            self._table.drop(tensor)
        else:
            self._table.put(tensor, owners)

    def _ordered(self, owners: Tensor) -> bool:
        if varying(owners) != [0]:
            return False
        repeats, rest = divmod(owners.shape[0], self._num_examples)
        if rest or not repeats:
            return False
        return torch.equal(owners.flatten(), self._in_order(repeats, owners.device))

    def _in_order(self, repeats: int, device: torch.device) -> Tensor:
        return torch.arange(self._num_examples, device=device).repeat_interleave(repeats)


def keeps_first_axis(call: Call, source: Tensor, result: Tensor, num_examples: int) -> bool:
    """Whether a movement of a tensor whose rows are in order certainly leaves them so."""
    name, rank = call.name, source.dim()
    if rank == 0:
        return True
    if name in ("transpose", "swapaxes", "swapdims"):
        axes = call.argument(1, "dim0"), call.argument(2, "dim1")
        return all(isinstance(axis, int) and axis % rank != 0 for axis in axes)
    if name == "permute":
        dims = call.args[1] if len(call.args) == 2 else call.args[1:] or call.kwargs["dims"]
        return bool(dims[0] % rank == 0)
    if name in ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"):
        return result.dim() > 0 and result.shape[0] % num_examples == 0
    if name in ("expand", "expand_as", "broadcast_to"):
        return result.dim() == rank
    if name == "unsqueeze":
        return bool(call.argument(1, "dim") % (rank + 1) != 0)
    if name == "squeeze":
        return source.shape[0] != 1
    if name == "__getitem__":
        return _keeps_first(call.args[1], rank)
    if name in ("split", "chunk", "split_with_sizes"):
        return bool(call.argument(2, "dim", 0) % rank != 0)
    if name in ("narrow", "select", "unbind", "index_select"):
        return bool(call.argument(1, "dim", 0) % rank != 0)
    if name in ("cat", "concat", "concatenate", "stack"):
        return bool(call.argument(1, "dim", 0) % result.dim() != 0)
    if name in ("gather", "take_along_dim"):
        return True
    return name == "__get__" and result.shape == source.shape


def _keeps_first(index: Any, rank: int) -> bool:
    first = index[0] if isinstance(index, tuple) and index else index
    if first is Ellipsis:
        taken = sum(item is not None for item in index) - 1 if isinstance(index, tuple) else 0
        return taken < rank
    return isinstance(first, slice) and first == slice(None)
