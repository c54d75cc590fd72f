"""A forward beside the one that is watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from weakref import WeakSet


class _Beside:
    """Lives as long as the block that it stands for, also where an interrupt ends that anywhere."""


_inside: WeakSet[_Beside] = WeakSet()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, the interception of torch functions looks away: what is run counts nothing."""
    beside = _Beside()
    try:
        _inside.add(beside)
        yield
    finally:
        _inside.discard(beside)


def is_watched() -> bool:
    return not _inside
