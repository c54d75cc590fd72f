"""Training data of several tasks in one data set, and how its examples are told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from hf_ewc.tasks.replay import Replayed, interleaved

TASK_OF_ROW = "hf_ewc_task_of_row"  # in a batch: the number of each row's task
PARTS = "hf_ewc_parts"  # in a batch: one batch for each task that has examples in it

# Where an example is: the number of its task, and its index in that task's training data.
Place = tuple[int, int]


class OfTask(NamedTuple):
    """An example and the number of its task; no dict, so that no column of it is taken away."""

    task: int
    example: Any


class Mixture(Dataset[Any]):
    """Examples of several tasks in a given order.

    Args:
        sources: the training data of each task.
        places: which examples, in order.
        tagged: hand out `OfTask`s.
    """

    def __init__(self, sources: Sequence[Any], places: Sequence[Place], tagged: bool) -> None:
        self.sources, self.places, self.tagged = sources, places, tagged

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        task, i = self.places[index]
        example = self.sources[task][i]
        return OfTask(task, example) if self.tagged else example


def places_with_replay(index: int, own: int, replayed: Replayed) -> list[Place]:
    """The task's own examples in order, with the replayed ones evenly between them."""
    earlier = [(task, i) for task, indices in replayed.items() for i in indices]
    order = np.random.default_rng(len(earlier)).permutation(len(earlier)).tolist()
    next_own = iter(range(own))
    return [
        (index, next(next_own)) if r is None else earlier[order[r]]
        for r in interleaved(own, len(earlier))
    ]


def joint_places(sizes: Sequence[int], seed: int) -> list[Place]:
    """All examples of all tasks, in an order from the seed."""
    places = [(task, i) for task, size in enumerate(sizes) for i in range(size)]
    return [places[k] for k in np.random.default_rng([seed, len(sizes)]).permutation(len(places))]


def mixed(sources: Sequence[Any], places: Sequence[Place], tagged: bool) -> Any:
    """The data set of these examples: a `datasets.Dataset` where all sources are alike, so that
    trainers which prepare their data themselves can, and otherwise a `Mixture`.
    """
    used = sorted({task for task, _ in places})
    tables = [sources[task] for task in used]
    # One with a transform would lose it.
    plain = all(isinstance(t, datasets.Dataset) and t.format["type"] != "custom" for t in tables)
    if tagged or not plain or any(table.features != tables[0].features for table in tables):
        return Mixture(sources, places, tagged)
    begin = dict(zip(used, np.cumsum([0, *map(len, tables)])[:-1].tolist(), strict=True))
    whole = datasets.concatenate_datasets(tables)
    return whole.select([begin[task] + i for task, i in places])


class MixtureCollator:
    """Makes a batch of examples of several tasks; what is no `OfTask` is collated as before.

    Args:
        collators: one for each task, each without the columns that the model does not take.
        apart: make one batch for each task; otherwise one for all, with the task of each row.
    """

    def __init__(self, collators: Sequence[Callable[[list[Any]], Any]], apart: bool) -> None:
        self.collators, self.apart = collators, apart

    def __call__(self, examples: list[OfTask]) -> Any:
        tasks = [one.task for one in examples]
        if not self.apart:
            batch = self.collators[max(tasks)]([one.example for one in examples])
            batch[TASK_OF_ROW] = torch.tensor(tasks)
            return batch
        return {
            PARTS: {
                str(task): self.collators[task]([o.example for o in examples if o.task == task])
                for task in sorted(set(tasks))
            }
        }
