"""How a collated batch divides into its examples.

A collator stacks most things, so that a row is an example; others it joins (the images of all
examples, some with two, some with none), lists (the names of their tasks, their boxes) or shares.
What an example has when it is collated alone says which; without that, sizes do, and are doubted
where they could mislead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ewc.fisher.examples.shares import (
    SHARED,
    Rows,
    Share,
    Shared,
    is_left_out,
    leaves,
    share_of,
    take_items,
)
from hf_ewc.fisher.labels import LABEL_NAMES
from hf_ewc.fisher.uses.nested import tensors_in

# The names that a label has in an example whose collator calls it "labels".
_OTHER_NAMES = {"labels": ("label", "label_ids")}
# What has no examples inside.
PLAIN = (str, bytes, int, float, bool, type(None))


class Inseparable(Exception):
    """A batch cannot be taken apart; the text says what of it."""


@dataclass(frozen=True)
class Layout:
    """How each input of a batch divides.

    Args:
        shares: by the input's name.
        doubtful: whether sizes alone have said it, and these could mislead.
        unconfirmed: whether sizes alone have said it, and the same could be meant otherwise.
    """

    shares: Mapping[str, Share]
    doubtful: bool = False
    unconfirmed: bool = False

    @classmethod
    def by_size(cls, inputs: Mapping[str, Any], size: int) -> Layout:
        """A first axis of `size`, or of a multiple of it, is that of the examples.

        Raises:
            Inseparable: something has another first axis.
        """
        shares = {name: _by_size(value, size, name) for name, value in inputs.items()}
        doubtful = _could_mislead(inputs, size)
        return cls(shares, doubtful, doubtful or _has_another_meaning(inputs, size))

    @classmethod
    def by_examples(cls, inputs: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]) -> Layout:
        """By what each example has alone.

        Raises:
            Inseparable: the batch is not made of these one after another.
        """
        missing = [name for one in alone for name in one if name not in inputs]
        if missing:
            raise Inseparable(f"{missing[0]!r} is there for an example alone only")
        return cls(
            {
                name: _by_examples(value, [one.get(name, _MISSING) for one in alone], name)
                for name, value in inputs.items()
            }
        )

    @classmethod
    def by_stacking(cls, inputs: Mapping[str, Any], examples: Sequence[Any]) -> Layout | None:
        """Where every input is the examples' own of that name, stacked, or may be; else None.

        It may be where a collator has added what is as large as something of theirs (a mask), and
        where another axis is as long as the batch: that is unconfirmed.
        """
        stacked: dict[str, tuple[int, ...]] = {}
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (len(examples),):
                return None
            if _is_stack(name, value, examples):
                stacked[name] = tuple(value.shape)
        added = [value for name, value in inputs.items() if name not in stacked]
        if any(v.dim() != 2 or tuple(v.shape) not in stacked.values() for v in added):
            return None
        row_each = Rows((1,) * len(examples))
        another_axis = any(len(examples) in value.shape[1:] for value in inputs.values())
        return cls(dict.fromkeys(inputs, row_each), unconfirmed=bool(added) or another_axis)

    def confirmed_by(self, inputs: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
        """Whether an example alone has one row of everything in the batch, and nothing else."""
        return inputs.keys() == alone.keys() and all(
            isinstance(one, Tensor) and one.dim() == inputs[name].dim() and len(one) == 1
            for name, one in alone.items()
        )

    def take(self, inputs: Mapping[str, Any], examples: Sequence[int]) -> dict[str, Any]:
        """The inputs of these examples."""
        return take_items(inputs, self.shares, examples)

    def only(self, examples: Sequence[int]) -> Layout:
        """That of what `take` makes for these examples."""
        shares = {
            name: share_of(share, examples)
            for name, share in self.shares.items()
            if not is_left_out(share, examples)
        }
        return replace(self, shares=shares)

    def uneven(self, inputs: Mapping[str, Any]) -> str | None:
        """What has not the same number of rows for each example; None where all do."""
        for path, value, share in leaves(inputs, self.shares, ""):
            if not isinstance(share, Rows):
                continue
            if len(set(share.counts)) > 1:
                return f"{path} has {', '.join(map(str, share.counts))} rows for them"
            if not isinstance(value, Tensor) and tensors_in(value):
                return f"{path} is a list of tensors, one for each"
        return None


_MISSING = object()


def _by_size(value: Any, size: int, path: str) -> Share:
    if isinstance(value, (Tensor, np.ndarray)):
        rows = value.shape[0] if value.ndim else 1
        if rows == 1:
            return SHARED
        if rows == 0 or rows % size:
            raise Inseparable(f"{path} has {rows} rows for {size} examples")
        return Rows((rows // size,) * size)
    if isinstance(value, Mapping):
        return {name: _by_size(item, size, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == size and not (isinstance(value, tuple) and _all_rows(value, size)):
            return Rows((1,) * size)
        return [_by_size(item, size, f"{path}.{i}") for i, item in enumerate(value)]
    return SHARED


def _all_rows(values: Iterable[Any], size: int) -> bool:
    return all(isinstance(value, Tensor) and value.shape[:1] == (size,) for value in values)


def _by_examples(value: Any, alone: Sequence[Any], path: str) -> Share:
    present = [one for one in alone if one is not _MISSING]
    if not present:
        raise Inseparable(f"{path} is there for several examples only")
    if any(_kind(one) is not _kind(value) for one in present):
        raise Inseparable(f"{path} is something else for an example alone")
    if isinstance(value, Mapping):
        return {
            name: _by_examples(
                item,
                [_MISSING if one is _MISSING else one.get(name, _MISSING) for one in alone],
                f"{path}.{name}",
            )
            for name, item in value.items()
        }
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        return _by_arrays(torch.as_tensor(value), _as_tensors(alone), path)
    if not isinstance(value, (list, tuple, np.ndarray)):
        return _shared(value, present, path)
    counts = tuple(0 if one is _MISSING else len(one) for one in alone)
    if sum(counts) == len(value):
        _check_items(list(value), [item for one in present for item in one], path)
        return Rows(counts, optional=len(present) < len(alone))
    if len(present) == len(alone) and set(counts) == {len(value)}:
        return [
            _by_examples(item, [one[i] for one in alone], f"{path}.{i}")
            for i, item in enumerate(value)
        ]
    raise Inseparable(f"{path} has {len(value)} rows, and {_listed(counts)} for examples alone")


def _as_tensors(alone: Sequence[Any]) -> list[Any]:
    return [one if one is _MISSING else torch.as_tensor(one) for one in alone]


def _by_arrays(value: Tensor, alone: Sequence[Any], path: str) -> Share:
    """Joined along the first axis, or a later one (time before batch), or the same for all."""
    present = [one for one in alone if one is not _MISSING]
    if any(one.ndim != value.ndim for one in present):
        raise Inseparable(f"{path} has another number of axes for an example alone")
    if value.ndim == 0:
        return _shared(value, present, path)
    joined = Rows(_lengths(alone, 0), optional=len(present) < len(alone))
    if sum(joined.counts) == len(value):
        if _is_telling(value, joined) and not _is_joined(value, present, 0):
            raise Inseparable(f"{path} says something else for an example alone")
        return joined
    if len(present) == len(alone):
        for axis in range(1, value.ndim):
            counts = _lengths(alone, axis)
            if sum(counts) == value.shape[axis] and _is_joined(value, present, axis):
                return Rows(counts, axis=axis)
        if len(value) == 1 and {len(one) for one in present} == {1}:  # as positions of all texts
            return SHARED
        if all(one.shape == value.shape for one in present):
            return _shared(value, present, path)
    raise Inseparable(
        f"{path} has the shape {tuple(value.shape)}, and {tuple(present[0].shape)} for an example "
        "alone"
    )


def _lengths(alone: Sequence[Any], axis: int) -> tuple[int, ...]:
    return tuple(0 if one is _MISSING else one.shape[axis] for one in alone)


def _is_telling(value: Tensor, joined: Rows) -> bool:
    """Whether the entries, too, have to be those of the examples alone, one after another.

    Padding and what is drawn at random make rows differ where each example has one. With several
    each, as of pairs, they may lie in another order; and whole numbers may be places in the batch.
    """
    if set(joined.counts) != {1}:
        return True
    return value.ndim == 1 and not value.is_floating_point() and value.dtype is not torch.bool


def _is_joined(value: Tensor, present: Sequence[Tensor], axis: int) -> bool:
    """Whether the entries are those of the examples alone; where they were padded it may be."""
    parts = value.split([one.shape[axis] for one in present], axis)
    for part, one in zip(parts, present, strict=True):
        if part.shape == one.shape and not _same(part, one):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(
            one.nan_to_num(), other.to(one).nan_to_num()
        )
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # objects with tensors or arrays in them
        return False


def _shared(value: Any, present: Sequence[Any], path: str) -> Shared:
    if not all(value is one or _same(value, one) for one in present):
        raise Inseparable(f"{path} is {value!s:.40}, and {present[0]!s:.40} for an example alone")
    return SHARED


def _check_items(value: Sequence[Any], items: Sequence[Any], path: str) -> None:
    """Refuse a list of numbers, texts or arrays that is not that of the examples alone."""
    for item, own in zip(value, items, strict=True):
        if isinstance(item, (Tensor, *PLAIN)) and not _same(item, own):
            raise Inseparable(f"{path} has {item!s:.40}, and {own!s:.40} for an example alone")


def _kind(value: Any) -> object:
    kinds = (Tensor, np.ndarray, Mapping, list, tuple)
    return next((kind for kind in kinds if isinstance(value, kind)), None)


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts[:8])) + (", …" if len(counts) > 8 else "")


def _is_stack(name: str, value: Tensor, examples: Sequence[Any]) -> bool:
    names = (name, *_OTHER_NAMES.get(name, ()))
    for example in examples:
        if not isinstance(example, Mapping):
            return False
        own = next((example[n] for n in names if n in example), _MISSING)
        if _axes(own) != value.dim() - 1:
            return False
    return True


def _axes(value: Any) -> int | None:
    """How many axes a tensor made of `value` has; None where that is not plain."""
    if isinstance(value, (Tensor, np.ndarray)):
        return int(value.ndim)
    if isinstance(value, (int, float, np.generic)):
        return 0
    if isinstance(value, (list, tuple)) and value:
        inner = _axes(value[0])
        return None if inner is None else inner + 1
    return None


def _could_mislead(inputs: Mapping[str, Any], size: int) -> bool:
    """Whether sizes may say the wrong thing of what belongs to which example.

    So it is with lists, with several rows for each example, and where things of several kinds lie
    side by side: as many images as texts need not be one for each.
    """
    seconds: dict[str, int | None] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.dim() and value.shape[0] not in (1, size):
                return True
            if value.dim() and value.shape[0] == size:
                seconds[name] = value.shape[1] if value.dim() > 1 else None
        elif not isinstance(value, PLAIN):
            return True
    labels = {seconds.pop(name) for name in LABEL_NAMES if name in seconds} - {None}
    masked = {axis for name in seconds for axis in inputs[name].shape[1:]}
    kinds = {
        second
        for name, second in seconds.items()
        if second not in labels and not (name.endswith("mask") and second in masked)
    }
    return len(kinds) > 1


def _has_another_meaning(inputs: Mapping[str, Any], size: int) -> bool:
    """Whether a row for each example is one of several meanings of these sizes.

    So it is with labels for positions, which may stand time first; where another axis is as long
    as the batch; where all examples may share what has as many rows, or lie in a single row.
    """
    others = 0
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        of_labels = name in LABEL_NAMES
        if value.dim() > 1 and (of_labels or value.shape[0] == 1 or size in value.shape[1:]):
            return True
        others += not of_labels and value.shape[0] == size
    return others > 1
