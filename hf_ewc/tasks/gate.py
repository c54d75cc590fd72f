"""A gate between tasks: what may be lost of an earlier task."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_ewc.metrics import AccuracyMatrix


class ForgettingError(RuntimeError):
    """A task's score fell by more than was allowed; the model before it is kept."""


def lost(matrix: AccuracyMatrix, index: int, allowed: float) -> dict[str, tuple[float, float]]:
    """The earlier tasks of which too much is lost after task `index`: the best score, and now's.

    R_j is lost where max_{i < index} R[i, j] − R[index, j] > `allowed`.
    """
    found = {}
    for j, name in enumerate(matrix.tasks[:index]):
        column = matrix.scores[:index, j]
        if np.isnan(column).all() or np.isnan(matrix.scores[index, j]):
            continue
        best, now = float(np.nanmax(column)), float(matrix.scores[index, j])
        if best - now > allowed:
            found[name] = (best, now)
    return found


def refusal(task: str, entries: list[dict[str, Any]], kept: Any) -> ForgettingError:
    """The error for a task that did not pass, with the figures of each attempt."""
    lines = [
        f"  with {entry['factor']:g} times the strength: "
        + "; ".join(
            f"{name!r} {best:.4g} → {now:.4g}" for name, (best, now) in entry["lost"].items()
        )
        for entry in entries
    ]
    return ForgettingError(
        f"After task {task!r} more was lost of earlier ones than max_forgetting = "
        f"{entries[0]['allowed']:g} allows:\n"
        + "\n".join(lines)
        + f"\nThe model before it is kept in {kept}. Use a larger ewc_lambda, replay, or more "
        "gate_retries, or allow more."
    )


def _in_words(found: dict[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name!r} {best:.4g} → {now:.4g}" for name, (best, now) in found.items())
