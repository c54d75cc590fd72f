"""The course of training within a task, as the results keep it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Entry = dict[str, float | None]


def history_of(log_history: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The entries of a trainer's log that hold a training loss; no timings.

    A figure that JSON cannot hold, as the norm of a gradient that overflowed, becomes None.
    """
    return [
        {name: _finite(value) for name, value in entry.items() if isinstance(value, (int, float))}
        for entry in log_history
        if "loss" in entry
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
