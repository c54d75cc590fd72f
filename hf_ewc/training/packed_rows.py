"""Rows in which several documents are packed, taken apart again."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import datasets
from torch import nn
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, Trainer

from hf_ewc.fisher.examples.packed import (
    LENGTHS,
    POSITIONS,
    TOKENS,
    are_lengths,
    document,
    keeps_documents_apart,
    lengths_by_position,
)
from hf_ewc.parameters.names import unwrap

logger = logging.getLogger("hf_ewc")

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
        return document(row, self._lengths(row), index - first)


class StreamedDocuments(IterableDataset[dict[str, Any]]):
    """The documents of packed rows that come one after the other."""

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            lengths = _noted(row) if are_lengths(row) else lengths_by_position(row)
            for number in range(len(lengths)):
                yield document(row, lengths, number)


def taken_apart(dataset: Any, model: nn.Module | None) -> Any:
    """The documents of a data set whose rows say where they end, else the data set.

    Only where the model keeps them apart, too.
    """
    if model is None or not keeps_documents_apart(unwrap(model)):
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        names = dataset.column_names
        tells = names is None or not {LENGTHS, POSITIONS}.isdisjoint(names)
        return StreamedDocuments(dataset) if tells else dataset
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    if LENGTHS in dataset.column_names and len(dataset) and are_lengths(dataset[0]):
        return Documents(dataset, [len(lengths) for lengths in dataset[LENGTHS]], _noted)
    if not {POSITIONS, TOKENS} <= set(dataset.column_names):
        return dataset
    needed = [n for n in (TOKENS, POSITIONS, "labels", "attention_mask") if n in dataset.features]
    rows = dataset.select_columns(needed).with_format("numpy")
    counts = [len(lengths_by_position(row)) for row in rows]
    if max(counts, default=1) <= 1:
        return dataset
    return Documents(dataset, counts, lengths_by_position)


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
