"""What the labels of a sequence of tasks say: their scenario, and how accuracy counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ewc.training.held_out import labels_of_some

SCENARIOS = ("task", "domain", "class")
CLASS_INCREMENTAL = (
    "These tasks have different labels and no `classes`, which makes the run class-incremental. "
    "EWC cannot do class-incremental learning by itself: it ends near what plain fine-tuning "
    "reaches (about 20 % on Split MNIST in every published source). Give each Task its `classes` "
    "if the task is known at test time, or replay examples of earlier tasks as well."
)


def guess_scenario(tasks: Sequence[tuple[Any, Sequence[int] | None]]) -> str:
    """ "task" where all tasks have classes, "class" where their labels are disjoint, else "domain".

    Args:
        tasks: training data and classes of each (van de Ven & Tolias 2019, arXiv 1904.07734, for
            the three scenarios).
    """
    if all(classes is not None for _, classes in tasks):
        return "task"
    labels = [labels_of(data) for data, _ in tasks]
    disjoint = len(set[int]().union(*labels)) == sum(map(len, labels))
    return "class" if len(tasks) > 1 and all(labels) and disjoint else "domain"


def labels_of(dataset: Any, limit: int = 64) -> set[int]:
    """The class labels in a data set; empty where a label is not a single integer.

    All of a `datasets.Dataset`'s are looked at, of other data sets about `limit` examples.
    """
    for column in ("labels", "label"):
        feature = (getattr(dataset, "features", None) or {}).get(column)
        if feature is not None and hasattr(dataset, "unique"):
            whole = "int" in str(getattr(feature, "dtype", ""))  # a list of labels has no dtype
            # Of its column alone: of a selection the library would copy all that is there.
            found = dataset.select_columns([column]).unique(column) if whole else []
            return set(_integers(found))
    return set(_integers(labels_of_some(dataset, limit)))


def labels_in_rows_of(dataset: Any, limit: int = 256) -> set[int]:
    """The classes among about `limit` examples with a label for each token, or for each class.

    Rows of 0 and 1 alone do not say which of the two they are: those of real numbers are taken for
    a label for each class, those of integers for nothing.
    """
    rows = [_array(value) for value in labels_of_some(dataset, limit)]
    if not rows or not all(row.ndim == 1 and row.dtype.kind in "iuf" for row in rows):
        return set()
    values = np.concatenate(rows)
    if set(np.unique(values)) <= {0, 1, -100}:
        real = all(row.dtype.kind == "f" for row in rows)
        return {int(i) for row in rows for i in np.flatnonzero(row == 1)} if real else set()
    whole = all(row.dtype.kind in "iu" for row in rows)
    return {int(value) for value in np.unique(values) if value != -100} if whole else set()


def commonest_share(dataset: Any, limit: int = 256) -> float | None:
    """The share of the most frequent class label among about `limit` examples, evenly spread.

    None where a label is not a single integer.
    """
    counts = Counter(_integers(labels_of_some(dataset, limit)))
    return max(counts.values()) / counts.total() if counts else None


def _integers(values: Sequence[Any]) -> list[int]:
    """Those that are labels; none where some are no single integers."""
    arrays = [_array(value) for value in values]
    if not all(array.ndim == 0 and array.dtype.kind in "iu" for array in arrays):
        return []
    return [int(array) for array in arrays if array != -100]


def _array(value: Any) -> np.ndarray[Any, Any]:
    """Of objects where rows in it are of several lengths."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(value, dtype=object)
