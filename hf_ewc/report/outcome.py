"""What one run over the tasks came to, and runs of several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_ewc.metrics import AccuracyMatrix


class LayerImportance(NamedTuple):
    """Σ F over a layer's parameters, and how many these are."""

    total: float
    parameters: int


@dataclass(frozen=True)
class Outcome:
    """What one run over the tasks came to.

    Args:
        matrix: R[i, j], the score on task j after training task i.
        seconds: wall time of the whole run: training, Fisher and evaluation.
        peak_memory: in bytes, of the process that needed most.
        importance: Σ F by layer, as the state holds it after the last task.
        searches: how λ was found before each task, where it was looked for: the task, what was
            `chosen` and the `trials`, each with `ewc_lambda` and `score`.
    """

    matrix: AccuracyMatrix
    seconds: float | None = None
    peak_memory: int | None = None
    importance: Mapping[str, LayerImportance] | None = None
    searches: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The matrix's entries, and those of the others that are known."""
        importance = {layer: list(found) for layer, found in (self.importance or {}).items()}
        own: dict[str, Any] = {
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "importance": importance,
            "lambda_search": list(self.searches),
        }
        return self.matrix.to_dict() | {key: value for key, value in own.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`; a `ValueError` or `TypeError` where an entry is none of its."""
        return cls(
            AccuracyMatrix.from_dict(data),
            _checked("seconds", data.get("seconds"), (int, float)),
            _checked("peak_memory", data.get("peak_memory"), int),
            _importance(data.get("importance")),
            tuple(data.get("lambda_search") or ()),
        )


def _checked(what: str, value: Any, kind: Any) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not value >= 0:
        raise ValueError(f"{what} is {value!r}, which is no number of at least 0")
    return value


def _importance(data: Any) -> dict[str, LayerImportance] | None:
    if data is None:
        return None
    return {
        layer: LayerImportance(
            float(_checked(layer, total, (int, float))), _checked(layer, parameters, int)
        )
        for layer, (total, parameters) in data.items()
    }


# For each method its runs, by seed or, where the seeds are not known, one after another.
Given = Mapping[
    str, Mapping[int, Outcome] | Mapping[int, AccuracyMatrix] | Sequence[Outcome | AccuracyMatrix]
]
Runs = dict[str, dict[int, Outcome]]


def as_runs(given: Given) -> Runs:
    """Every method's outcomes by seed; without seeds they are counted from 0.

    Raises:
        ValueError: no methods, a method without runs, or runs over other tasks.
    """
    runs = {str(method): _by_seed(repeats) for method, repeats in given.items()}
    empty = [method for method, repeats in runs.items() if not repeats]
    if empty or not runs:
        raise ValueError(f"a report needs runs of each method; there are none of {empty or 'any'}.")
    tasks = {outcome.matrix.tasks for repeats in runs.values() for outcome in repeats.values()}
    if len(tasks) > 1:
        first, other, *_ = tasks
        raise ValueError(
            f"the runs are over different tasks, {list(first)} and {list(other)}; "
            "give each their own report."
        )
    return runs


def _by_seed(repeats: Any) -> dict[int, Outcome]:
    pairs = repeats.items() if isinstance(repeats, Mapping) else enumerate(repeats)
    return {int(seed): one if isinstance(one, Outcome) else Outcome(one) for seed, one in pairs}


def figure_of(trial: Mapping[str, Any], search: Mapping[str, Any]) -> float | None:
    """What a trial of a search for λ scored, as evaluation gave it: a loss above 0."""
    score: float | None = trial["score"]
    return -score if search.get("by_improvement") and score is not None else score


def matrices(repeats: Mapping[int, Outcome]) -> list[AccuracyMatrix]:
    return [outcome.matrix for outcome in repeats.values()]
