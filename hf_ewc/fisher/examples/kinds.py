"""What is given as data and is none: tables, texts, rows without names, labels that are words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def check_kind(what: str, data: Any) -> None:
    """Refuse what is no data set of examples: tables, several splits, paths, nothing.

    Raises:
        TypeError: it is no data set.
        ValueError: it is empty.
    """
    library = type(data).__module__.split(".")[0]
    if library in ("pandas", "polars", "pyarrow"):
        raise TypeError(
            f"{what} is a {library} {type(data).__name__}; give a data set of examples, such as "
            "datasets.Dataset.from_pandas(table, preserve_index=False)."
        )
    if isinstance(data, Mapping):
        raise TypeError(
            f"{what} is a {type(data).__name__} with the keys {list(data)[:5]}; give one data set, "
            "such as one split of a DatasetDict, or datasets.Dataset.from_dict(columns)."
        )
    if isinstance(data, (set, frozenset)):
        raise TypeError(f"{what} is a {type(data).__name__}, which has no order; give a list.")
    if isinstance(data, (str, bytes)) or not (
        data is None or hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise TypeError(f"{what} is {data!r:.60}; give a data set of examples.")
    if _number_of(data) == 0:
        raise ValueError(f"{what} is empty; give at least one example.")


def _number_of(data: Any) -> int | None:
    """None where it is not known, as of a loader of a stream, which has a length only to fail."""
    try:
        return len(data)
    except TypeError:
        return None


def check_named(what: str, data: Any) -> None:
    """Refuse arrays, and examples whose values have no names, of which no collator was given.

    Raises:
        TypeError: with what they are.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        raise TypeError(
            f"{what} is an array of the shape {tuple(data.shape)}; needed are examples with names "
            "and labels, such as datasets.Dataset.from_dict({'pixel_values': …, 'labels': …})."
        )
    first = data[0]
    if not isinstance(first, Mapping) and not hasattr(first, "__dict__"):
        raise TypeError(
            f"an example of {what} is a {type(first).__name__}; needed is a dict of the model's "
            "arguments with 'labels' among them, or a data_collator that makes batches of these."
        )


def check_label_numbers(what: str, data: Any) -> None:
    """Refuse labels that are words, of a data set whose examples can be read by number.

    Raises:
        ValueError: with the first one.
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return
    example = data[0]
    for column in ("labels", "label"):
        label = example.get(column) if isinstance(example, Mapping) else None
        first = label[0] if isinstance(label, (list, tuple)) and label else label
        if isinstance(first, str):
            raise ValueError(
                f"the {column} of {what} are strings, such as {first!r}; needed are the numbers "
                "of classes from 0: in a datasets.Dataset "
                f"dataset.class_encode_column({column!r}), which counts them in alphabetical "
                "order; every task's data must be numbered alike."
            )
