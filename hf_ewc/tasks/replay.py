"""Which examples of earlier tasks a later one trains on again.

What is replayed follows from seeds and sizes alone, so that a run which goes on replays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_ewc.tasks.sequence_config import SequenceConfig

# Indices into each earlier task's training data, by the number of the task.
Replayed = dict[int, list[int]]


def replayed_in(index: int, datasets: Sequence[Any], config: SequenceConfig) -> Replayed:
    """What task `index` replays of `datasets[:index]`, by one of the three ways.

    - share s: round(s · N) examples, N the number of the task's own, evenly from earlier tasks;
    - per class: that many of each class of each earlier task, always the same;
    - size: a sample of that many out of all examples of earlier tasks (Vitter's algorithm R).
    """
    sizes = [len(data) for data in datasets]
    if config.replay_share:
        count = round(config.replay_share * sizes[index])
        found = _evenly(count, sizes[:index], [config.replay_seed, index])
    elif config.replay_per_class:
        found = {
            task: _of_each_class(datasets[task], config.replay_per_class, config.replay_seed, task)
            for task in range(index)
        }
    elif config.replay_size:
        found = _reservoir(config.replay_size, sizes[:index], config.replay_seed)
    else:
        found = {}
    return {task: sorted(indices) for task, indices in found.items() if indices}


def interleaved(own: int, replayed: int) -> list[int | None]:
    """Positions for `own` + `replayed` examples, the replayed ones evenly between: k, or None.

    The r-th replayed example is at ⌊(r + ½) (own + replayed) / replayed⌋; None stands for the next
    of the task's own.
    """
    total = own + replayed
    places: list[int | None] = [None] * total
    for r in range(replayed):
        places[(2 * r + 1) * total // (2 * replayed)] = r
    return places


def _evenly(count: int, sizes: Sequence[int], seed: list[int]) -> Replayed:
    """`count` indices, as many of each task; what a small task lacks is made up by the others."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(sizes)).tolist()  # who gets the odd ones
    taken = dict.fromkeys(order, 0)
    left = min(count, sum(sizes))
    while left:
        unspent = [task for task in order if taken[task] < sizes[task]]
        share, odd = divmod(left, len(unspent))
        for rank, task in enumerate(unspent):
            more = min(share + (rank < odd), sizes[task] - taken[task])
            taken[task] += more
            left -= more
    return {
        task: generator.choice(sizes[task], taken[task], replace=False).tolist() for task in taken
    }


def _of_each_class(data: Any, count: int, seed: int, task: int) -> list[int]:
    groups: dict[int | None, list[int]] = {}
    for position, label in enumerate(labels_by_example(data)):
        groups.setdefault(label, []).append(position)
    order = np.random.default_rng([seed, task])
    found: list[int] = []
    for label in sorted(groups, key=str):
        found += order.permutation(groups[label])[:count].tolist()
    return found


def labels_by_example(data: Any) -> list[int | None]:
    """The class of each example; None where its label is not one integer."""
    columns = getattr(data, "column_names", None)
    for name in ("labels", "label"):
        if isinstance(columns, list) and name in columns and hasattr(data, "with_format"):
            return [_as_class(value) for value in data.with_format(None)[name]]
    return [_as_class(_label_in(data[i])) for i in range(len(data))]


def _label_in(example: Any) -> Any:
    if not isinstance(example, Mapping):
        return None
    return example.get("labels", example.get("label"))


def _as_class(value: Any) -> int | None:
    array = np.asarray(value)
    return int(array) if array.ndim == 0 and array.dtype.kind in "iub" else None


def _reservoir(size: int, sizes: Sequence[int], seed: int) -> Replayed:
    """Vitter 1985, algorithm R: example n (from 0) enters with probability size / (n + 1)."""
    kept: list[tuple[int, int]] = []
    generator = np.random.default_rng([seed, size])
    seen = 0
    for task, count in enumerate(sizes):
        places = generator.integers(0, np.arange(seen, seen + count) + 1)
        for i, place in enumerate(places.tolist()):
            if len(kept) < size:
                kept.append((task, i))
            elif place < size:
                kept[place] = (task, i)
        seen += count
    found: Replayed = {}
    for task, i in kept:
        found.setdefault(task, []).append(i)
    return found
