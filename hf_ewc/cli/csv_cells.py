"""What the cells of a csv file are: words, or numbers where all of a column are.

A reader that guesses takes a file in parts, and each part, and each file, for itself: a label is
then a number in one and a word in the other, "01" becomes 1, and "true" True.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

_WHOLE = r"^\s*-?(0|[1-9][0-9]{0,14})\s*$"  # no more digits than an fp64 holds: not those of an id
_NUMBER = r"^\s*-?((0|[1-9][0-9]{0,14})(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*$"


def as_words(path: str, options: Mapping[str, Any]) -> datasets.Features:
    """The columns that the first line names, each of words.

    Raises:
        ValueError: it names one twice.
    """
    first = pd.read_csv(path, nrows=1, header=None, dtype=str, **options).iloc[0].dropna()
    if first.duplicated().any():
        raise ValueError(
            f"its first line names the column {first[first.duplicated()].iloc[0]!r} twice"
        )
    names = pd.read_csv(path, nrows=0, **options).columns
    return datasets.Features({str(name): datasets.Value("string") for name in names})


def with_numbers(data: datasets.Dataset) -> datasets.Dataset:
    """Without rows that have nothing in any cell; columns of plain numbers alone hold numbers."""
    table = data.data.table
    filled = pa.chunked_array([pa.repeat(pa.scalar(False), len(data))])
    for column in table.columns:
        filled = pc.or_(filled, column.is_valid())
    if not pc.all(filled).as_py():
        data = data.select(pc.indices_nonzero(filled).to_pylist())
    columns = zip(table.column_names, table.columns, strict=True)
    numbers = {name: datasets.Value(kind) for name, column in columns if (kind := _kind(column))}
    return data.cast(datasets.Features({**data.features, **numbers})) if numbers else data


def _kind(column: pa.ChunkedArray) -> str | None:
    """The numbers that a column holds, or None for words."""
    if column.null_count == len(column):
        return None
    for kind, pattern in (("int64", _WHOLE), ("float64", _NUMBER)):
        if pc.all(pc.match_substring_regex(column, pattern)).as_py():
            return kind
    return None
