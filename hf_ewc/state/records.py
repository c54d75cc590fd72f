"""What a state says in words and figures: the records of its tasks, and further facts."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from hf_ewc.importance import Fisher

Value = TypeVar("Value")
# Objects within objects: what is a hundred deep is no fact about a state.
_DEEPEST = 64


@dataclass(frozen=True)
class TaskRecord:
    """What is known of one consolidated task.

    Args:
        name: the task's name.
        num_examples: examples that its Fisher was estimated on.
        fisher_type: "exact", "sampled", "empirical" or "batched".
        weight: w, by which its Fisher was multiplied.
        date: when it was consolidated, ISO 8601 in UTC.
        labels_per_example: T, by which its Fisher was divided, so that it is per label.
        fisher_trace: Σ F / T before any weight; None in states that were written before it was
            kept.
        ewc_lambda: λ by which earlier tasks were held while this one was trained; None where none
            were, or it is not known.
        confidence: mean probability of the most probable class where its Fisher was estimated
            (`Fisher.confidence`); None where there is none, or it was not kept yet.

    Raises:
        ValueError: a value is of another type or out of its range.
    """

    name: str
    num_examples: int
    fisher_type: str
    weight: float
    date: str
    labels_per_example: float = 1.0
    fisher_trace: float | None = None
    ewc_lambda: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        for field in ("name", "fisher_type", "date"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise ValueError(f"{field} of a task is {value!r:.80}; it is a string.")
        if type(self.num_examples) is not int or not 1 <= self.num_examples < 2**63:
            raise ValueError(
                f"num_examples of a task is {self.num_examples!r:.80}; from 1 to below 2**63."
            )
        if not is_number(self.weight):
            raise ValueError(f"weight of a task is {self.weight!r:.80}; finite and at least 0.")
        labels = self.labels_per_example
        if not is_number(labels) or labels < 1:
            raise ValueError(f"labels_per_example of a task is {labels!r:.80}; at least 1.")
        for field in ("fisher_trace", "ewc_lambda", "confidence"):
            value = getattr(self, field)
            if value is not None and not is_number(value):
                raise ValueError(f"{field} of a task is {value!r:.80}; finite and at least 0.")
        if self.confidence is not None and self.confidence > 1.0:
            raise ValueError(f"confidence of a task is {self.confidence!r:.80}; at most 1.")

    @classmethod
    def now(
        cls, name: str, fisher: Fisher, weight: float, ewc_lambda: float | None = None
    ) -> TaskRecord:
        """The record of a task that is consolidated at this moment."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        labels = float(fisher.labels_per_example)
        return cls(
            name,
            fisher.num_examples,
            fisher.fisher_type,
            float(weight),
            date,
            labels_per_example=labels,
            fisher_trace=fisher.trace / labels,
            ewc_lambda=ewc_lambda,
            confidence=fisher.confidence,
        )


def check_records(tasks: Iterable[TaskRecord]) -> None:
    for task in tasks:
        if not isinstance(task, TaskRecord):
            raise TypeError(f"tasks hold a {type(task).__name__}; needed are TaskRecords.")


class ReadOnly(Mapping[str, Value]):
    """A mapping that cannot be changed; the values that it hands out are copies."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = copy.deepcopy(dict(values))

    def __getitem__(self, key: str) -> Value:
        return copy.deepcopy(self._values[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def is_number(value: object, above: float = -1.0) -> bool:
    """Whether `value` is an int or a float, finite, at least 0 and above `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return 0.0 <= float(value) < math.inf and value > above
    except OverflowError:  # an int of 400 digits
        return False


def is_list_of(kind: type) -> Callable[[Any], bool]:
    """Whether a value is a list whose entries are of this very type."""
    return lambda value: isinstance(value, list) and all(type(entry) is kind for entry in value)


def as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` as they would come back from a JSON file.

    Raises:
        ValueError: JSON cannot hold them.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be what JSON can hold: {error}.") from error
    if _is_deeper(found, _DEEPEST):
        raise ValueError(f"metadata are more than {_DEEPEST} objects deep.")
    return found


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inner = (v.values() if isinstance(v, dict) else v for v in level if v)
        level = [each for group in inner for each in group if isinstance(each, (dict, list))]
    return bool(level)
