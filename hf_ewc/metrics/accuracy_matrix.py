"""The scores of a sequence of tasks as a matrix, and the measures taken from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class AccuracyMatrix:
    """R[i, j], the score on task j after training on task i, and what follows from it.

    With T tasks learnt, R a (T, T) matrix, b the scores of the untrained model and r those of
    models trained jointly:

    | measure           | definition                                    | source |
    |-------------------|-----------------------------------------------|--------|
    | average accuracy  | 1/T Σ_j R[T, j]                               | [1]    |
    | backward transfer | 1/(T-1) Σ_{j<T} (R[T, j] - R[j, j])           | [1]    |
    | forward transfer  | 1/(T-1) Σ_{j>1} (R[j-1, j] - b[j])            | [1]    |
    | forgetting        | 1/(T-1) Σ_{j<T} (max_{i<T} R[i, j] - R[T, j]) | [2]    |
    | intransigence     | 1/T Σ_j (r[j] - R[j, j])                      | [2]    |
    | learning accuracy | 1/T Σ_j R[j, j]                               | [3]    |

    [1] Lopez-Paz & Ranzato 2017, arXiv 1706.08840; [2] Chaudhry et al. 2018, arXiv 1801.10112;
    [3] Riemer et al. 2019, arXiv 1810.11910.

    The name says accuracy, as the literature does; any score of which more is better will do.
    An entry that has not been measured is NaN, and a measure that needs it raises a `ValueError`.
    The means over T-1 tasks are NaN while T is 1. Every measure takes `after`, the task (index or
    name) up to which to count, by default the last one learnt.

    Args:
        tasks: the names of the tasks, in the order of training, or a full matrix without names.
        scores: (T, T), row by row; None: nothing measured yet.
        baseline: b, by task; needed by forward transfer alone.
        joint: r, by task: the score on it of a model trained on the data of all tasks up to it;
            needed by intransigence alone.
        lower_is_better: tasks whose figure is better the lower it is, with its name, such as
            `{"news": "perplexity"}`. Their scores are that figure with the other sign; reports
            and `to_dict` give the figure.
        others: what is only evaluated, such as general text: by name T + 1 scores, before the first
            task and after each. No measure counts them.

    Raises:
        ValueError: shapes that do not fit the names, names that repeat, infinite scores, or what
            is not a number.
    """

    def __init__(
        self,
        tasks: Sequence[str] | Sequence[Sequence[float]] | Array,
        scores: Sequence[Sequence[float | None]] | Array | None = None,
        *,
        baseline: Sequence[float] | Mapping[str, float] | None = None,
        joint: Sequence[float] | Mapping[str, float] | None = None,
        lower_is_better: Mapping[str, str] | None = None,
        others: Mapping[str, Sequence[float | None] | None] | None = None,
    ) -> None:
        if scores is None and len(tasks) and not isinstance(tasks[0], str):
            tasks, scores = [f"task {i + 1}" for i in range(len(tasks))], tasks  # type: ignore[assignment]
        self.tasks: tuple[str, ...] = tuple(str(name) for name in tasks)
        if not self.tasks:
            raise ValueError("AccuracyMatrix got no tasks; give at least one name.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks are {list(self.tasks)}; each needs a name of its own.")
        size = len(self.tasks)
        empty: Array = np.full((size, size), np.nan)
        self.scores: Array = empty if scores is None else _floats("scores", scores, (size, size))
        self.baseline = self._vector("baseline", baseline)
        self.joint = self._vector("joint", joint)
        self.others = {name: self._other(name, values) for name, values in (others or {}).items()}
        self.lower_is_better = dict(lower_is_better or {})
        unknown = self.lower_is_better.keys() - {*self.tasks, *self.others}
        if unknown:
            raise ValueError(
                f"lower_is_better names {sorted(unknown)}; the tasks are {list(self.tasks)}."
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: tuple[int | str, int | str]) -> float:
        return float(self.scores[self._at(index[0]), self._at(index[1])])

    def __setitem__(self, index: tuple[int | str, int | str], score: float) -> None:
        self.scores[self._at(index[0]), self._at(index[1])] = _finite(index[1], score)

    def set_other(self, name: str, learnt: int, score: float) -> None:
        """The score on what is only evaluated, after so many tasks (0: before the first)."""
        if name not in self.others:
            raise KeyError(f"nothing named {name!r} is only evaluated; there are {[*self.others]}.")
        self.others[name][learnt] = _finite(name, score)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccuracyMatrix) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"AccuracyMatrix({list(self.tasks)}, scores=\n{np.array_str(self.scores, precision=4)})"
        )

    def sign(self, name: str) -> int:
        """-1 where the score is a figure with the other sign, since lower is better; else 1."""
        return -1 if name in self.lower_is_better else 1

    @property
    def signs(self) -> Array:
        """`sign` of each task, (T,): times a row of R it gives the figures as they are known."""
        return np.array([self.sign(name) for name in self.tasks], dtype=np.float64)

    @property
    def num_learnt(self) -> int:
        """Tasks learnt so far: up to the last row that has its own task's score."""
        learnt = np.flatnonzero(~np.isnan(np.diag(self.scores)))
        return int(learnt[-1]) + 1 if learnt.size else 0

    def average_accuracy(self, after: int | str | None = None) -> float:
        """ACC = 1/T Σ_j R[T, j] over the T tasks learnt [1]."""
        last = self._last(after)
        return float(np.mean(self._known("average accuracy", last, range(last + 1))))

    def backward_transfer(self, after: int | str | None = None) -> float:
        """BWT = 1/(T-1) Σ_{j<T} (R[T, j] - R[j, j]), below 0 where tasks were forgotten [1]."""
        last = self._last(after)
        before = range(last)
        now = self._known("backward transfer", last, before)
        return _mean(now - self._known("backward transfer", before, before))

    def forward_transfer(self, after: int | str | None = None) -> float:
        """FWT = 1/(T-1) Σ_{j>1} (R[j-1, j] - b[j]), each task just before it is trained [1]."""
        last = self._last(after)
        if self.baseline is None:
            raise ValueError(
                "forward transfer compares with the untrained model's scores; "
                "give baseline=, a score by task."
            )
        ahead = self._known("forward transfer", range(last), range(1, last + 1))
        return _mean(ahead - self.baseline[1 : last + 1])

    def forgetting(self, after: int | str | None = None) -> float:
        """F = 1/(T-1) Σ_{j<T} (max_{i<T} R[i, j] - R[T, j]), over the measured i [2]."""
        last = self._last(after)
        before = range(last)
        now = self._known("forgetting", last, before)
        self._known("forgetting", before, before)
        if not last:
            return float("nan")
        return _mean(np.nanmax(self.scores[:last, :last], axis=0) - now)

    def learning_accuracy(self, after: int | str | None = None) -> float:
        """LA = 1/T Σ_j R[j, j], each task right after it was learnt [3]."""
        learnt = range(self._last(after) + 1)
        return _mean(self._known("learning accuracy", learnt, learnt))

    def intransigence(self, after: int | str | None = None) -> float:
        """I = 1/T Σ_j (r[j] - R[j, j]), what new tasks lose to a model trained jointly [2]."""
        learnt = range(self._last(after) + 1)
        if self.joint is None:
            raise ValueError(
                "intransigence compares with a model trained jointly; give joint=, a score by task."
            )
        own = self._known("intransigence", learnt, learnt)
        return _mean(self.joint[: len(learnt)] - own)

    def summary(self, after: int | str | None = None) -> dict[str, float]:
        """The measures by name; those that the entries known so far do not allow are left out."""
        measures = {
            "average_accuracy": self.average_accuracy,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "forgetting": self.forgetting,
            "learning_accuracy": self.learning_accuracy,
            "intransigence": self.intransigence,
        }
        found = {}
        for name, measure in measures.items():
            try:
                value = measure(after)
            except ValueError:
                continue
            if not np.isnan(value):
                found[name] = value
        return found

    def take_over(self, earlier: AccuracyMatrix) -> None:
        """Take the scores and the baseline of a matrix over the first of these tasks.

        Raises:
            ValueError: its tasks are not the first of these.
        """
        size = len(earlier)
        if self.tasks[:size] != earlier.tasks:
            raise ValueError(
                f"the tasks {list(earlier.tasks)} are not the first of {list(self.tasks)}."
            )
        self.scores[:size, :size] = earlier.scores
        for name in self.others.keys() & earlier.others.keys():
            self.others[name][: size + 1] = earlier.others[name]
        if earlier.baseline is not None:
            self.baseline = np.full(len(self), np.nan)
            self.baseline[:size] = earlier.baseline

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; NaN becomes None.

        Where lower is better it is the figure that is written, not its negative.
        """
        signs = self.signs
        content = {
            "tasks": list(self.tasks),
            "scores": [_nones(row) for row in self.scores * signs],
            "baseline": None if self.baseline is None else _nones(self.baseline * signs),
            "joint": None if self.joint is None else _nones(self.joint * signs),
        }
        if self.lower_is_better:
            content["lower_is_better"] = dict(self.lower_is_better)
        if self.others:
            content["others"] = {
                name: _nones(values * self.sign(name)) for name, values in self.others.items()
            }
        return content

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AccuracyMatrix:
        """The inverse of `to_dict`. Raises a `ValueError` where tasks or scores are missing."""
        missing = [key for key in ("tasks", "scores") if key not in data]
        if missing:
            raise ValueError(
                f"an accuracy matrix needs tasks and scores; missing: {', '.join(missing)}."
            )
        if not isinstance(data["tasks"], list) or not all(
            isinstance(name, str) for name in data["tasks"]
        ):
            raise ValueError(f"tasks are {data['tasks']!r}; needed is a list of names.")
        matrix = cls(
            data["tasks"],
            data["scores"],
            baseline=data.get("baseline"),
            joint=data.get("joint"),
            lower_is_better=data.get("lower_is_better"),
            others=data.get("others"),
        )
        return matrix._with_other_sign()

    def _with_other_sign(self) -> AccuracyMatrix:
        """From figures to scores, in place."""
        signs = self.signs
        self.scores *= signs
        for vector in (self.baseline, self.joint):
            if vector is not None:
                vector *= signs
        for name, values in self.others.items():
            values *= self.sign(name)
        return self

    def _other(self, name: str, values: Sequence[float | None] | None) -> Array:
        if name in self.tasks:
            raise ValueError(f"{name!r} is a task, and only evaluated as well; name one otherwise.")
        size = len(self) + 1
        return np.full(size, np.nan) if values is None else _floats(name, values, (size,))

    def _vector(self, what: str, values: Any) -> Array | None:
        if values is None:
            return None
        if isinstance(values, Mapping):
            if set(values) != set(self.tasks):
                raise ValueError(
                    f"{what} is given for {sorted(values)}; the tasks are {sorted(self.tasks)}."
                )
            values = [values[name] for name in self.tasks]
        return _floats(what, values, (len(self),))

    def _at(self, task: int | str) -> int:
        if isinstance(task, str):
            if task not in self.tasks:
                raise KeyError(f"no task is named {task!r}; the tasks are {list(self.tasks)}.")
            return self.tasks.index(task)
        if not -len(self) <= task < len(self):
            raise IndexError(f"task {task} asked for; there are {len(self)}.")
        return task % len(self)

    def _last(self, after: int | str | None) -> int:
        if after is not None:
            return self._at(after)
        if not self.num_learnt:
            raise ValueError(
                "no task has a score after its own training yet; set matrix[i, i] first."
            )
        return self.num_learnt - 1

    def _known(self, measure: str, rows: int | range, columns: range) -> Array:
        """The entries (rows[k], columns[k]), or an error that names those not measured."""
        at = [rows] * len(columns) if isinstance(rows, int) else list(rows)
        values: Array = self.scores[at, list(columns)] if len(columns) else np.empty(0)
        if np.isnan(values).any():
            unknown = [(i, j) for i, j, v in zip(at, columns, values, strict=True) if np.isnan(v)]
            raise ValueError(f"{measure} needs the scores R[i, j] at {unknown}, not measured yet.")
        return values


def _mean(values: Array) -> float:
    return float(np.mean(values)) if values.size else float("nan")


def _finite(name: int | str, score: float) -> float:
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"score on task {name!r} is {value}; it must be a finite number.")
    return value


def _floats(what: str, values: Any, shape: tuple[int, ...]) -> Array:
    """Numbers as an array of this shape, None as NaN; a `ValueError` for anything else."""
    odd = (
        [] if isinstance(values, np.ndarray) else [v for v in _entries(values) if not _is_score(v)]
    )
    if odd:
        raise ValueError(f"{what} must be numbers of shape {shape}; {odd[0]!r} is none.")
    try:
        array = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} must be numbers of shape {shape}: {error}") from error
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}; {shape} is needed, one entry by task.")
    if np.isinf(array).any():
        raise ValueError(f"{what} has infinite entries; NaN (or None) marks what was not measured.")
    return array


def _entries(values: Any) -> Iterator[Any]:
    if isinstance(values, (list, tuple, np.ndarray)):
        for value in values:
            yield from _entries(value)
    else:
        yield values


def _is_score(value: Any) -> bool:
    """A number or None; NumPy would take `"1"` and `True` for numbers, too."""
    return value is None or (
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    )


def _nones(values: Array) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]
