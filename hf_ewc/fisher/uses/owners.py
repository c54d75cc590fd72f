"""How the owners of a tensor's elements go with what is done to the tensor.

The owners of a tensor x, the example that each element belongs to, are an integer tensor of as many
axes, each of the size of x's or of 1 where they do not vary along it. Where elements are only moved
(`transpose`, `view`, indexing, `cat`, ...) the owners are moved by the same function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.uses.call import Call, Uncovered

# Views of their first argument, at no cost for owners that are expanded to its shape.
_TRANSPOSING = {"transpose", "t", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"}
_FITTING = {"unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "__get__"}
_VIEWS = frozenset(_TRANSPOSING | _FITTING | {"diagonal", "unfold", "mT", "T", "adjoint"})
# With the place of the argument that says along which axis.
_ALONG = {
    "split": 2, "chunk": 2, "split_with_sizes": 2, "tensor_split": 2, "narrow": 1, "select": 1,
    "unbind": 1, "index_select": 1, "repeat_interleave": 2,
}  # fmt: skip
_OTHERS = {"__getitem__", "repeat", "tile", "where", "flip", "roll", "gather", "take_along_dim"}
_JOINING = frozenset({"cat", "concat", "concatenate", "stack"})
_RESHAPING = frozenset({"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"})
_PICKING = frozenset({"nonzero", "argwhere", "masked_select"})
MOVEMENTS = frozenset({*_VIEWS, *_ALONG, *_JOINING, *_RESHAPING, *_PICKING, *_OTHERS})


def reduced(owners: Tensor) -> Tensor:
    """With axes of size 1 where the owners do not vary."""
    for axis, stride in enumerate(owners.stride()):
        if stride == 0 and owners.shape[axis] > 1:
            owners = owners.narrow(axis, 0, 1)
    for axis, size in enumerate(owners.shape):
        if size > 1:
            first = owners.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(owners), owners):
                owners = first
    return owners


def varying(owners: Tensor) -> list[int]:
    """The axes along which the owners vary."""
    return [axis for axis, size in enumerate(owners.shape) if size != 1]


def merged(owners: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
    """The owners of what was broadcast to `shape`; `Uncovered` where they differ."""
    aligned = [one.reshape(*[1] * (len(shape) - one.dim()), *one.shape) for one in owners]
    result = aligned[0]
    for other in aligned[1:]:
        first, second = torch.broadcast_tensors(result, other)
        if not torch.equal(first, second):
            raise Uncovered
    if any(size not in (1, whole) for size, whole in zip(result.shape, shape, strict=True)):
        raise Uncovered
    return result


def leading(owners: Tensor, source: Tensor, shape: Sequence[int]) -> Tensor:
    """The owners of a result of this shape that has the same leading axes as its source."""
    axes = 1 + max(varying(owners), default=-1)
    if tuple(shape[:axes]) != tuple(source.shape[:axes]):
        raise Uncovered
    return owners.reshape(*owners.shape[:axes], *[1] * (len(shape) - axes))


def constant_along(owners: Tensor, axes: Iterable[int]) -> Tensor:
    """The owners, if they do not vary along these axes; `Uncovered` otherwise."""
    if any(owners.shape[axis] != 1 for axis in axes):
        raise Uncovered
    return owners


def moved(call: Call, sources: list[Tensor], owners: list[Tensor], results: Any) -> list[Tensor]:
    """The owners of the results of a function that only moves elements.

    Args:
        sources: the tensors whose elements are moved; `owners` are theirs.
        results: the tensors that came of it.
    """
    name, (source, own) = call.name, (sources[0], owners[0])
    if name in _RESHAPING:
        return [_reshaped(own, source.shape, results[0].shape)]
    if name in _PICKING or name == "where":
        return _picked(call, source, own, results)
    if name in _VIEWS:
        return _list(_on(call, own.expand(source.shape)))
    if name in _JOINING:
        return [_joined(call, sources, owners)]
    if name == "__getitem__":
        return [_indexed(source, own, call.args[1])]
    if name in _ALONG:
        axis = call.argument(_ALONG[name], "dim", None if name == "repeat_interleave" else 0)
        axes = range(source.dim()) if axis is None else [axis]
        return _list(_on(call, _expanded_along(own, source, axes)))
    return _list(_on(call, own.expand(source.shape)))


def _on(call: Call, owners: Tensor) -> Any:
    if call.args:
        return call.func(owners, *call.args[1:], **call.kwargs)
    return call.func(**{**call.kwargs, "input": owners})


def _list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _expanded_along(owners: Tensor, source: Tensor, axes: Iterable[int]) -> Tensor:
    wanted = {axis % source.dim() for axis in axes}
    sizes = [size if axis in wanted else -1 for axis, size in enumerate(source.shape)]
    return owners.expand(sizes)


def _joined(call: Call, sources: list[Tensor], owners: list[Tensor]) -> Tensor:
    axis = call.argument(1, "dim", 0)
    if call.name == "stack":
        axis = axis % (owners[0].dim() + 1)
        owners = [one.unsqueeze(axis) for one in owners]
    else:
        owners = [
            _expanded_along(one, source, [axis])
            for one, source in zip(owners, sources, strict=True)
        ]
    axis = axis % owners[0].dim()
    if len({one.dim() for one in owners}) > 1:
        raise Uncovered
    common = [max(sizes) for sizes in zip(*(one.shape for one in owners), strict=True)]
    common[axis] = -1
    return torch.cat([one.expand(common) for one in owners], axis)


def _indexed(source: Tensor, owners: Tensor, index: Any) -> Tensor:
    """owners[index], with axes of size 1 for those that the index leaves alone."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is Ellipsis for item in items) or isinstance(index, list):
        return owners.expand(source.shape)[index]
    axes = sum(_axes_of(item) for item in items)
    sizes = [size if axis < axes else -1 for axis, size in enumerate(source.shape)]
    return owners.expand(sizes)[index]


def written(shape: Sequence[int], index: Any, owners: Tensor, num_examples: int) -> Tensor:
    """The owners of a blank tensor of this shape in which `index` was given to `owners`.

    Examples are in order along one of its axes; what was not written is of whom that axis says.
    """
    items = index if isinstance(index, tuple) else (index,)
    plain = not isinstance(index, list) and all(item is not Ellipsis for item in items)
    axes = sum(_axes_of(item) for item in items) if plain else len(shape)
    sizes = [size if axis < axes else 1 for axis, size in enumerate(shape)]
    found = torch.full(sizes, -1, device=owners.device)
    found[index] = owners
    for axis, size in enumerate(sizes):
        if size % num_examples:
            continue
        rows = torch.arange(num_examples, device=owners.device)
        rows = rows.repeat_interleave(size // num_examples)
        rows = rows.reshape(-1, *[1] * (len(sizes) - axis - 1))
        if bool(((found == rows) | (found < 0)).all()):
            return rows.reshape(*[1] * axis, *rows.shape)
    raise Uncovered


def _axes_of(item: Any) -> int:
    if item is None or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def by_index(call: Call, indices: list[Tensor], owners: list[Tensor], rank: int) -> Tensor:
    """The owners of what is picked from a shared tensor: those of the indices.

    Args:
        indices: those that carry examples; `owners` are theirs.
        rank: of the result.
    """
    index, own = indices[0], owners[0]
    axis = 0
    if call.name == "repeat_interleave":  # as often as the examples say
        axis = call.argument(2, "dim", 0)
        own = own.expand(index.shape).repeat_interleave(index, 0)
    elif call.name == "index_select":
        axis = call.argument(1, "dim")
    else:
        items = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        axis = next(i for i, item in enumerate(items) if not isinstance(item, slice))
        if any(isinstance(item, Tensor) and item.dtype == torch.bool for item in items):
            own = own.expand(index.shape)[index]
        elif not all(isinstance(item, (slice, Tensor)) for item in items):
            raise Uncovered
        else:
            widest = torch.broadcast_shapes(*(i.shape for i in items if isinstance(i, Tensor)))
            own = merged(owners, widest)
    after = rank - axis - own.dim()
    if axis < 0 or after < 0:
        raise Uncovered
    return own.reshape(*[1] * axis, *own.shape, *[1] * after)


def _picked(call: Call, source: Tensor, owners: Tensor, results: Sequence[Tensor]) -> list[Tensor]:
    """Of the elements that are not zero, or under a mask."""
    mask = call.argument(1, "mask") if call.name == "masked_select" else source != 0
    found = owners.expand(source.shape)[mask.expand(source.shape)]
    return [found.reshape(-1, *[1] * (result.dim() - 1)) for result in results]


def _reshaped(owners: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """owners.expand(before).reshape(after), written out only as far as it varies.

    Of the last axes, what is common to both shapes and has one owner is taken off first.
    """
    old, new = list(before), list(after)
    ones, repeats = 0, 1  # axes of size 1 to append, and of the axis before how often to repeat
    while old and new and old[-1] and new[-1] and owners.shape[-1] == 1:
        common = math.gcd(old[-1], new[-1])
        if common != min(old[-1], new[-1]):
            break
        if old[-1] == common:
            old.pop()
            owners = owners.squeeze(-1)
        else:
            old[-1] //= common
        if new[-1] == common:
            new.pop()
            ones, repeats = ones + 1, 1
        else:
            new[-1] //= common
            repeats *= common
    result = owners.expand(old).reshape(new)
    if repeats > 1:
        result = result.repeat_interleave(repeats, -1)
    return result.reshape(*result.shape, *[1] * ones)
