"""Of which example each row of a tensor is.

Rows are in order along the first axis, row r of B·k belonging to example r // k, until an
operation picks them by indices that depend on the data, as the router of a mixture of experts
does. From there on their owners are followed; where they cannot be, they are unknown, and a
parameter that meets such rows is not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.table import TensorTable

_UNKNOWN = object()
# How many rows come out, and whose, depends on the data.
_PICKING = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"})
_JOINING = frozenset({"cat", "concat", "concatenate", "stack", "vstack"})
_SPLITTING = frozenset({"split", "chunk", "split_with_sizes", "tensor_split"})
# Rows come out in another order, or as another axis.
_TRANSPOSING = {
    "transpose",
    "t",
    "permute",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "__get__",
}
_REORDERING = {"flip", "roll", "rot90", "cumsum", "cumprod", "sort", "argsort", "topk", "gather"}
_MOVING = frozenset(_TRANSPOSING | _REORDERING | {"einsum", "bmm"})
# Rows are written into the first argument, which keeps its own.
_WRITERS = ("index_add", "index_copy", "index_put", "index_fill", "masked_scatter", "scatter")
_SCATTERS = ("scatter_add", "scatter_reduce")
_IN_PLACE = {name + "_" for name in (*_WRITERS, *_SCATTERS, "copy")}
_WRITING = frozenset({"__setitem__", *_WRITERS, *_SCATTERS} | _IN_PLACE)


class RowOwners:
    """The owners of rows that were gathered; of all others it is known that they are in order.

    Args:
        num_examples: B.
        is_shared: whether a tensor depends on no example.
    """

    def __init__(self, num_examples: int, is_shared: Callable[[Tensor], bool]) -> None:
        self._num_examples = num_examples
        self._is_shared = is_shared
        self._table = TensorTable()  # the owners, shaped as the leading axes, or _UNKNOWN

    def gathered(self, tensor: Tensor) -> Tensor | None:
        """The example of each row (R,) where rows were gathered, None where they are in order."""
        owners = self._table.get(tensor)
        if owners is None:
            return None
        if owners is _UNKNOWN or owners.dim() != 1:
            raise Uncovered
        rows: Tensor = owners
        return rows

    def of(self, tensor: Tensor) -> Tensor:
        """The example of each row along the first axis, (R,)."""
        gathered = self.gathered(tensor)
        if gathered is not None:
            return gathered
        return self._in_order(self.per_example(tensor), tensor.device)

    def per_example(self, tensor: Tensor) -> int:
        """k for a tensor of B·k rows; `Uncovered` where the rows are no multiple of B."""
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows == 0 or rows % self._num_examples:
            raise Uncovered
        return rows // self._num_examples

    def copy(self, target: Tensor, source: Tensor) -> None:
        """The rows of `target` are those of `source`."""
        self._put(target, self._table.get(source))

    def follow(self, call: Call, inputs: list[Tensor], outputs: Sequence[Tensor]) -> None:
        """Note the owners of the rows that an operation returned."""
        name, args = call.name, call.args
        if name in ("__getitem__", "index_select") and self._follow_index(name, args, outputs[0]):
            return
        if name in ("sort", "argsort", "topk") and args[0].dim() == 1:
            self._follow_sort(args[0], outputs)
            return
        if name in _PICKING or _picks_by_data(call):
            self._forget(outputs)
            return
        if not self._table:
            return
        if name in _SPLITTING and self._follow_split(args[0], outputs):
            return
        if name in _JOINING and self._follow_join(inputs, outputs[0]):
            return
        for output in outputs:
            if name in _WRITING:
                self.copy(output, args[0])
            else:
                self._put(output, self._merged(name, inputs, output))

    def _merged(self, name: str, inputs: list[Tensor], output: Tensor) -> Any:
        """The owners of a result, row by row those of the inputs; unknown where they differ."""
        known = [(tensor, self._table.get(tensor)) for tensor in inputs]
        if output.dim() == 0 or all(owners is None for _, owners in known):
            return None
        found: list[Tensor] = []
        for tensor, owners in known:
            aligned = tensor.dim() > 0 and tensor.shape[0] == output.shape[0]
            if owners is None:
                if aligned and not self._is_shared(tensor):
                    return _UNKNOWN  # rows in order beside rows that were gathered
            elif owners is _UNKNOWN:
                if aligned or tensor.shape[:1] == (1,):
                    return _UNKNOWN
            elif output.shape[: owners.dim()] == owners.shape:
                found.append(owners)
            elif output.shape[0] == owners.numel():
                found.append(owners.flatten())
        if not found or name in _MOVING:
            return _UNKNOWN
        same = all(other is found[0] or torch.equal(other, found[0]) for other in found[1:])
        return found[0] if same else _UNKNOWN

    def _follow_index(self, name: str, args: Sequence[Any], result: Any) -> bool:
        """x[i] has the rows owners(x)[i]; False where the first axis is not picked from."""
        source, index = args[0], args[-1]
        if name == "index_select":
            index = (index,) if args[1] in (0, -source.dim()) else ()
        items = list(index) if isinstance(index, tuple) else [index]
        new_axes = 0
        while items and items[0] is None:
            items.pop(0)
            new_axes += 1
        if self._is_shared(source) or not any(_is_index(item) for item in items[:2]):
            return False
        if not _is_index(items[0]):  # x[0, i] picks from another axis, x[:, i] keeps the rows
            if isinstance(items[0], int):
                self._table.put(result, _UNKNOWN)
            return isinstance(items[0], int)
        owners: Any
        try:
            owners = _picked(self.of(source), items, source)
        except Uncovered:
            owners = _UNKNOWN if self._table.get(source) is not None else None
        if isinstance(owners, Tensor):
            if new_axes == 0 and owners.dim() > 1 and owners.numel():
                rows = owners.flatten(1)
                if torch.equal(rows, rows[:, :1].expand_as(rows)):
                    owners = rows[:, 0]
            owners = owners.reshape(*[1] * new_axes, *owners.shape)
            if result.shape[: owners.dim()] != owners.shape:
                owners = _UNKNOWN
        self._put(result, owners)
        return True

    def _follow_sort(self, source: Tensor, outputs: Sequence[Tensor]) -> None:
        self._forget(outputs)
        if len(outputs) == 2:
            values, order = outputs
            try:
                self._put(values, self.of(source)[order])
            except Uncovered:
                return

    def _follow_split(self, source: Tensor, outputs: Sequence[Tensor]) -> bool:
        """Blocks of gathered rows; False where it is another axis that is split."""
        owners = self._table.get(source)
        sizes = [output.shape[0] for output in outputs if output.dim()]
        if not isinstance(owners, Tensor) or sum(sizes) != owners.shape[0]:
            return False
        for output, block in zip(outputs, owners.split(sizes), strict=True):
            self._table.put(output, block)
        return True

    def _follow_join(self, inputs: list[Tensor], output: Tensor) -> bool:
        """Rows one after another; False where tensors are joined along another axis."""
        if sum(tensor.shape[0] for tensor in inputs if tensor.dim()) != output.shape[0]:
            return False
        try:
            self._put(output, torch.cat([self.of(tensor) for tensor in inputs]))
        except Uncovered:
            self._table.put(output, _UNKNOWN)
        return True

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._table.put(tensor, _UNKNOWN)

    def _put(self, tensor: Tensor, owners: Any) -> None:
        if isinstance(owners, Tensor) and owners.dim() == 1 and self._ordered(owners):
            owners = None
        if owners is None:
            self._table.drop(tensor)
        else:
            self._table.put(tensor, owners)

    def _ordered(self, owners: Tensor) -> bool:
        repeats, rest = divmod(owners.shape[0], self._num_examples)
        if rest or not repeats:
            return False
        return torch.equal(owners, self._in_order(repeats, owners.device))

    def _in_order(self, repeats: int, device: torch.device) -> Tensor:
        return torch.arange(self._num_examples, device=device).repeat_interleave(repeats)


def _picks_by_data(call: Call) -> bool:
    if call.name == "where":  # with a condition alone it is nonzero()
        return len(call.args) + len(call.kwargs) == 1
    return call.name == "repeat_interleave" and isinstance(call.argument(1, "repeats"), Tensor)


def _is_index(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() > 0


def _picked(owners: Tensor, items: Sequence[Any], source: Tensor) -> Tensor:
    """The owners of x[i, …], one for each entry of the indices, broadcast."""
    index = items[0]
    if index.dtype == torch.bool:
        shape = source.shape[: index.dim()]
        owners = owners.reshape(-1, *[1] * (index.dim() - 1)).expand(shape)
        return owners[index]
    others = [i.shape for i in items if isinstance(i, Tensor) and i.dtype != torch.bool]
    picked = owners[index.to(owners.device)]
    return picked.expand(torch.broadcast_shapes(*others))
