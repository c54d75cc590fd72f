"""From what the user gives as data to the batches of one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from transformers import default_data_collator

from hf_ewc.fisher.examples.batch import (
    Collator,
    ExampleBatch,
    looks_collated,
    may_be_batch,
    numbered_batches,
)
from hf_ewc.fisher.examples.choice import choose, labels_of
from hf_ewc.fisher.examples.collating import Collating, batches_of_examples, collated, numbered
from hf_ewc.fisher.examples.kinds import check_kind, check_label_numbers, check_named


@dataclass(frozen=True)
class Selection:
    """Which examples are wanted: see `estimate_fisher`; `rank` of `world` is this process.

    With `in_documents`, those of packed rows are examples of their own.
    """

    num_samples: int | None = None
    batch_size: int = 8
    stratified: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    in_documents: bool = False


@dataclass(frozen=True)
class Source:
    """The batches of one process.

    Args:
        first: makes a batch that starts with the very first example, the same in every process.
        batches: this process's share.
        expected: how many batches these are, where it is known.
        advice: what else the data could be meant as, for where they turn out not to run.
    """

    first: Callable[[], ExampleBatch | None]
    batches: Iterator[ExampleBatch]
    expected: int | None = None
    advice: str = ""


# Of lists whose elements have several labels, as an example of a text has and a batch of images.
_ARE_BATCHES = (
    "Each element of the list was taken for a batch, whose rows are the examples; where it is one "
    "example, give a data_collator, too, such as transformers.default_data_collator. "
)
_MAY_BE_BATCHES = (
    "Each element of the list was taken for one example; where it is a batch, give an iterator "
    "over them: iter(list). "
)


def source_of(data: Any, collator: Collator | None, wanted: Selection) -> Source:
    """The batches of `data` that are this process's to run.

    Examples with an index are chosen once for all processes and shared one by one; batches that
    come from an iterable, which every process reads, are shared batch by batch. A DataLoader over
    a whole data set, prepared by Accelerate or not, stands for the data set.

    Raises:
        ValueError: the data are empty, or a stratified draw or a share of them cannot be had.
        TypeError: the data are no data set and no iterable.
    """
    if isinstance(data, DataLoader):
        if _is_whole(data):
            return _from_loader(data, wanted)
        _refuse_shared(data, wanted.world)
    if _is_indexable(data):
        if collator is None:
            check_named("data", data)
            check_label_numbers("data", data)
        batches = isinstance(data, (list, tuple)) and looks_collated(data[0])
        if collator is not None or not batches:
            source = _from_examples(data, collator or default_data_collator, wanted)
            unsure = collator is None and isinstance(data, (list, tuple)) and may_be_batch(data[0])
            return replace(source, advice=_MAY_BE_BATCHES) if unsure else source
    if wanted.stratified:
        raise ValueError("Stratified draws need a data set with a length and indices.")
    if isinstance(data, IterableDataset) or (collator is not None and not _is_indexable(data)):
        return _from_stream(data, collator or default_data_collator, wanted)
    found = _shared(numbered_batches(data, wanted.num_samples, wanted.in_documents), wanted)
    return replace(found, advice=_ARE_BATCHES) if isinstance(data, (list, tuple)) else found


def _from_examples(data: Any, collate: Collator, wanted: Selection) -> Source:
    chosen = _chosen(data, wanted)
    share = chosen[wanted.rank :: wanted.world]
    return Source(
        lambda: next(batches_of_examples(data, chosen[:1], collate, 1)),
        batches_of_examples(data, share, collate, wanted.batch_size),
        -(-len(share) // wanted.batch_size),
    )


def _from_loader(loader: DataLoader[Any], wanted: Selection) -> Source:
    """The examples of the loader's data set, collated as the loader does it, by its workers."""
    data, collate = loader.dataset, loader.collate_fn
    chosen = _chosen(data, wanted)
    share = chosen[wanted.rank :: wanted.world]
    size: int = loader.batch_size or wanted.batch_size
    groups = [share[start : start + size] for start in range(0, len(share), size)]
    own: DataLoader[Any] = DataLoader(
        data, batch_sampler=groups, collate_fn=Collating(collate), num_workers=loader.num_workers
    )
    return Source(
        lambda: next(batches_of_examples(data, chosen[:1], collate, 1)),
        (
            batch
            for ids, divided in zip(groups, own, strict=True)
            for batch in numbered(divided, ids)
        ),
        len(groups),
    )


def _chosen(data: Any, wanted: Selection) -> list[int]:
    labels = labels_of(data, range(len(data))) if wanted.stratified else None
    return choose(len(data), wanted.num_samples, wanted.seed, labels)


def _from_stream(data: Iterable[Any], collate: Collator, wanted: Selection) -> Source:
    """The first examples of an iterable data set; only this process's batches are collated."""
    size = wanted.batch_size
    stream = enumerate(itertools.islice(data, wanted.num_samples))
    head = list(itertools.islice(stream, size))

    def batches_of(chunk: list[tuple[int, Any]]) -> Iterator[ExampleBatch]:
        return collated(collate, [example for _, example in chunk], [i for i, _ in chunk])

    def batches() -> Iterator[ExampleBatch]:
        chunk, turn = head, 0
        while chunk:
            if turn % wanted.world == wanted.rank:
                yield from batches_of(chunk)
            chunk, turn = list(itertools.islice(stream, size)), turn + 1

    return Source(lambda: next(batches_of(head[:1])) if head else None, batches())


def _shared(stream: Iterator[ExampleBatch], wanted: Selection) -> Source:
    """Batches that come collated: each process takes every `world`-th."""
    head = next(stream, None)
    everything = itertools.chain([] if head is None else [head], stream)
    batches = (b for i, b in enumerate(everything) if i % wanted.world == wanted.rank)

    def first() -> ExampleBatch | None:
        return head.part(0, 1) if head is not None and head.divisible else head

    return Source(first, batches)


def _is_indexable(data: Any) -> bool:
    if isinstance(data, Mapping) and any(isinstance(value, Tensor) for value in data.values()):
        raise TypeError("data is a dict; needed is a data set, or an iterable of batches: [batch].")
    if data is None:
        raise TypeError("data is None; needed is a data set or iterable.")
    check_kind("data", data)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _is_whole(loader: DataLoader[Any]) -> bool:
    """Whether the processes' loaders together run over every example of a map-style data set."""
    if isinstance(loader.dataset, IterableDataset) or not _is_indexable(loader.dataset):
        return False
    # Where Accelerate has prepared the loader, the batch sampler that was given lies inside.
    batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
    if type(batches) is not BatchSampler:
        return False
    sampler = batches.sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source) == size
    if isinstance(sampler, DistributedSampler):
        return len(sampler.dataset) == size  # type: ignore[arg-type]
    return isinstance(sampler, SequentialSampler) and len(sampler) == size


def _refuse_shared(loader: DataLoader[Any], world: int) -> None:
    prepared = isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))
    if prepared and world > 1:
        raise ValueError(
            f"This {type(loader).__name__} was prepared by Accelerate for {world} processes: it "
            "gives each its own share, filled up with repeated examples, and does not run over a "
            "whole data set with a length. Pass the data set with its data_collator, or the "
            "DataLoader as it was before prepare(); the examples are then shared out here."
        )
