"""Rows in which TRL has packed several documents, taken apart again."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import datasets

LENGTHS = "seq_lengths"  # of the documents in a row, as TRL notes them


class Documents:
    """The documents of packed rows, an example each; a row is read when one of it is asked for.

    The Fisher is a mean over examples of squares: a row as one example would give the square of
    its documents' sum.

    Args:
        rows: with the documents' lengths beside their tokens.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows
        self._ends = list(accumulate(len(lengths) for lengths in rows[LENGTHS]))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self._ends, index)
        row = self._rows[place]
        lengths = row[LENGTHS]
        number = index - (self._ends[place - 1] if place else 0)
        start, size = sum(lengths[:number]), lengths[number]
        own = {
            name: value[start : start + size]
            for name, value in row.items()
            if hasattr(value, "__len__") and len(value) == sum(lengths) and name != LENGTHS
        }
        return {**row, **own, LENGTHS: lengths[number : number + 1]}


def taken_apart(dataset: Any) -> Any:
    """The documents of a data set whose rows say where they end, else the data set."""
    if isinstance(dataset, datasets.Dataset) and LENGTHS in dataset.column_names:
        return Documents(dataset)
    return dataset
