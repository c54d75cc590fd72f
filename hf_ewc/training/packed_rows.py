"""Rows in which several documents are packed, taken apart again."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import datasets
import numpy
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, Trainer

logger = logging.getLogger("hf_ewc")

LENGTHS = "seq_lengths"  # of the documents in a row, as TRL notes them
POSITIONS = "position_ids"  # which begin again at 0 with each document
TOKENS = "input_ids"
Lengths = Callable[[Mapping[str, Any]], list[int]]


class Documents:
    """The documents of packed rows, an example each; a row is read when one of it is asked for.

    The Fisher is a mean over examples of squares: a row as one example would give the square of
    its documents' sum.

    Args:
        rows: with the documents' lengths or the tokens' positions beside the tokens.
        counts: documents of each row.
        lengths: tokens of each document of a row.
    """

    def __init__(self, rows: datasets.Dataset, counts: list[int], lengths: Lengths) -> None:
        self._rows = rows
        self._ends = list(accumulate(counts))
        self._lengths = lengths

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self._ends, index)
        row = self._rows[place]
        first = self._ends[place - 1] if place else 0
        return _document(row, self._lengths(row), index - first)


class StreamedDocuments(IterableDataset[dict[str, Any]]):
    """The documents of packed rows that come one after the other."""

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            lengths = _noted(row) if LENGTHS in row else _by_position(row)
            for number in range(len(lengths)):
                yield _document(row, lengths, number)


def taken_apart(dataset: Any) -> Any:
    """The documents of a data set whose rows say where they end, else the data set."""
    if isinstance(dataset, datasets.IterableDataset):
        names = dataset.column_names
        tells = names is None or not {LENGTHS, POSITIONS}.isdisjoint(names)
        return StreamedDocuments(dataset) if tells else dataset
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    if LENGTHS in dataset.column_names:
        return Documents(dataset, [len(lengths) for lengths in dataset[LENGTHS]], _noted)
    if not {POSITIONS, TOKENS} <= set(dataset.column_names):
        return dataset
    needed = [n for n in (TOKENS, POSITIONS, "labels", "attention_mask") if n in dataset.features]
    counts = [len(_by_position(row)) for row in dataset.select_columns(needed).with_format("numpy")]
    return Documents(dataset, counts, _by_position) if max(counts, default=1) > 1 else dataset


def joins_examples(trainer: Trainer) -> bool:
    """Whether the trainer's collator makes one row of all examples of a batch, without padding."""
    collator = trainer.data_collator
    flattens = isinstance(collator, DataCollatorWithFlattening)
    return flattens or bool(getattr(collator, "padding_free", False))


def warn_of_wrapped(trainer: Trainer, dataset: Any) -> None:
    """Say that a row is one example where TRL has cut texts without noting where each ends."""
    wraps = getattr(trainer.args, "packing", False) and (
        getattr(trainer.args, "packing_strategy", None) == "wrapped"
    )
    if wraps and dataset is trainer.train_dataset and trainer.is_world_process_zero():
        logger.warning(
            "packing_strategy='wrapped' does not say where a text ends, so each packed row is one "
            "example of the Fisher. For an example of each text, pass the texts to consolidate(), "
            "or pack by 'bfd'."
        )


def _noted(row: Mapping[str, Any]) -> list[int]:
    return list(row[LENGTHS])


def _by_position(row: Mapping[str, Any]) -> list[int]:
    """Lengths of a row's documents: positions count up from 0 in each, and no token is padding.

    A row of which that, or a label for each token, is not so is one document.
    """
    whole = [len(row.get(TOKENS, ()))]
    if not all(_of_tokens(row[name], *whole) for name in (POSITIONS, "labels") if name in row):
        return whole
    if POSITIONS not in row or not all(row.get("attention_mask", ())):
        return whole
    positions = numpy.asarray(row[POSITIONS])
    begins = numpy.flatnonzero(positions == 0)
    goes_on = numpy.diff(positions) == 1
    if len(begins) < 2 or positions[0] != 0 or not (goes_on | (positions[1:] == 0)).all():
        return whole
    return [end - begin for begin, end in pairwise([*begins.tolist(), *whole])]


def _document(row: Mapping[str, Any], lengths: list[int], number: int) -> dict[str, Any]:
    """Document `number` of a row, with its part of all that is there for each token.

    Positions that count from 0 are left out: they are the model's own, and collators do not pad
    them.
    """
    start, size = sum(lengths[:number]), lengths[number]
    own = {
        name: value[start : start + size]
        for name, value in row.items()
        if hasattr(value, "__len__") and len(value) == sum(lengths) and name != LENGTHS
    }
    noted = {LENGTHS: [size]} if LENGTHS in row else {}
    found = {**row, **own, **noted}
    if POSITIONS in own and numpy.array_equal(own[POSITIONS], range(size)):
        del found[POSITIONS]
    return found


def _of_tokens(value: Any, number: int) -> bool:
    """Whether there is one number for each token of a row."""
    if not hasattr(value, "__len__") or len(value) != number:
        return False
    return number == 0 or not hasattr(value[0], "__len__")
