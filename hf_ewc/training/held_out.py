"""Which examples of a task's training data are kept out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset
from transformers import Trainer

HELD_OUT = 0.2  # of a task's training examples
FEWEST = 2


def has_rows(data: Any) -> bool:
    """Whether its examples can be counted and read by number, which streams' cannot."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def held_out_rows(count: int, seed: int) -> list[int]:
    """A fifth of `count` examples, at least one, in order; the same in every process and run.

    Raises:
        ValueError: there are fewer than two.
    """
    if count < FEWEST:
        raise ValueError(
            f"the training data has {count} examples, of which some are to be held out; needed "
            f"are {FEWEST} or more."
        )
    order = np.random.default_rng([seed, count]).permutation(count)
    return sorted(order[: max(1, round(HELD_OUT * count))].tolist())


def hold_out(trainer: Trainer) -> Any:
    """Take a part out of a trainer's training data, and return it; None where it has no data.

    The rows are those of its seed.

    Raises:
        ValueError: the data is a stream, or has fewer than two examples.
    """
    data: Any = trainer.train_dataset
    if data is None:
        return None
    if not has_rows(data):
        raise ValueError(
            "fisher_data is 'held_out' and the training data is a stream, of which no part can be "
            "held out; give one with a length and examples by number, or fisher_data='train'."
        )
    rows = held_out_rows(len(data), trainer.args.seed)
    trainer.train_dataset = rows_of(data, other_rows(len(data), rows))
    return rows_of(data, rows)


def other_rows(count: int, rows: Sequence[int]) -> list[int]:
    """All but these."""
    out = set(rows)
    return [row for row in range(count) if row not in out]


def rows_of(data: Any, rows: Sequence[int]) -> Any:
    """The examples with these numbers, as a data set of the same kind where that is possible."""
    return data.select(rows) if isinstance(data, datasets.Dataset) else Subset(data, rows)


def labels_of_some(dataset: Any, limit: int) -> list[Any]:
    """The labels of about so many examples; none where they cannot be read by number."""
    if not has_rows(dataset):
        return []
    step = max(1, len(dataset) // limit)
    examples = [dataset[i] for i in range(0, len(dataset), step)]
    if not all(isinstance(example, Mapping) for example in examples):
        return []
    return [example.get("labels", example.get("label")) for example in examples]


def number_of_labels(dataset: Any, limit: int = 256) -> int:
    """How many labels the examples have, by about `limit` of them; one each where that is unknown.

    A token's label counts like an image's; missing ones, −100, do not.
    """
    arrays = [np.asarray(value) for value in labels_of_some(dataset, limit)]
    if not arrays or not all(array.dtype.kind in "iub" for array in arrays):
        return len(dataset)
    counted = sum(int((array != -100).sum()) for array in arrays)
    return round(len(dataset) * counted / len(arrays))
