"""What of a value in a batch belongs to which example, and taking that out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Entries along one axis, `counts[n]` of them of example n, one example after another.

    With `optional`, the whole entry is left out where no example that is taken has any.
    """

    counts: tuple[int, ...]
    optional: bool = False
    axis: int = 0


@dataclass(frozen=True)
class Shared:
    """The same for all examples."""


# Of a value in a batch; nested as the value is.
Share = Any
SHARED = Shared()


def leaves(value: Any, share: Share, path: str) -> Iterator[tuple[str, Any, Share]]:
    """What a nested value holds, each with its path and its share."""
    items: Iterable[tuple[Any, Any, Share]]
    if isinstance(share, Mapping):
        items = [(name, value[name], inner) for name, inner in share.items()]
    elif isinstance(share, list):
        items = [(i, value[i], inner) for i, inner in enumerate(share)]
    else:
        yield path, value, share
        return
    for name, item, inner in items:
        yield from leaves(item, inner, f"{path}.{name}" if path else str(name))


def take(value: Any, share: Share, examples: Sequence[int]) -> Any:
    """What of `value` is of these examples, or of all, in a container of its kind."""
    if isinstance(share, Rows):
        return _take_rows(value, share, examples)
    if isinstance(share, Mapping):
        taken = take_items(value, share, examples)
        if type(value) is dict:
            return taken
        made = copy.copy(value)
        for name in set(value) - taken.keys():
            del made[name]
        for name, item in taken.items():
            made[name] = item
        return made
    if isinstance(share, list):
        items = [take(item, inner, examples) for item, inner in zip(value, share, strict=True)]
        return _like(value, items)
    return value


def take_items(
    value: Mapping[str, Any], shares: Mapping[str, Share], examples: Sequence[int]
) -> dict[str, Any]:
    """As `take`, of each entry by itself, without those that are left out."""
    return {
        name: take(item, shares[name], examples)
        for name, item in value.items()
        if not is_left_out(shares[name], examples)
    }


def share_of(share: Share, examples: Sequence[int]) -> Share:
    """The share of what `take` makes for these examples."""
    if isinstance(share, Rows):
        return replace(share, counts=tuple(share.counts[n] for n in examples))
    if isinstance(share, Mapping):
        return {
            name: share_of(inner, examples)
            for name, inner in share.items()
            if not is_left_out(inner, examples)
        }
    return [share_of(inner, examples) for inner in share] if isinstance(share, list) else share


def is_left_out(share: Share, examples: Sequence[int]) -> bool:
    """Whether none of these examples has any of an entry that is optional."""
    return isinstance(share, Rows) and share.optional and not any(share.counts[n] for n in examples)


def _take_rows(value: Any, share: Rows, examples: Sequence[int]) -> Any:
    starts = [0, *itertools.accumulate(share.counts)]
    rows = [row for n in examples for row in range(starts[n], starts[n + 1])]
    if isinstance(value, (Tensor, np.ndarray)):
        return value[(slice(None),) * share.axis + (rows,)]
    return _like(value, [value[row] for row in rows])


def _like(value: Any, items: list[Any]) -> Any:
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return items
