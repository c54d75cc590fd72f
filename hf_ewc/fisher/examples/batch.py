"""Which examples are used, and in which batches: chosen once, for all processes, from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_ewc.fisher.labels import IGNORED, LABEL_NAMES

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class ExampleBatch:
    """A collated batch, and a number for each example that is the same on any process.

    The last `padding` examples repeat others and count nothing.
    """

    inputs: dict[str, Any]
    ids: list[int]
    padding: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> ExampleBatch:
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), self.inputs)
        return ExampleBatch(moved, self.ids, self.padding)

    @property
    def divisible(self) -> bool:
        """Whether every tensor has one row per example, or one for all, so that examples can be
        taken out."""
        return all(size in (1, len(self)) for size in self._rows())

    def _rows(self) -> list[int]:
        tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        return [tensor.shape[0] for tensor in tensors if tensor.dim()]

    def part(self, start: int, stop: int) -> ExampleBatch:
        return self.only(list(range(len(self)))[start:stop])

    def only(self, examples: Sequence[int]) -> ExampleBatch:
        """The batch of these examples, by their places in this one."""
        whole = list(examples) == list(range(len(self)))

        def rows(tensor: Tensor) -> Tensor:
            own = tensor.dim() > 0 and tensor.shape[0] == len(self) and not whole
            return tensor[list(examples)] if own else tensor

        inputs = tree_map_only(Tensor, rows, self.inputs)
        return ExampleBatch(inputs, [self.ids[n] for n in examples])

    def pair(self) -> ExampleBatch | None:
        """The two examples with the most labels; None where none has any."""
        labels = next((self.inputs[n] for n in LABEL_NAMES if n in self.inputs), None)
        if not isinstance(labels, Tensor) or labels.dim() == 0 or labels.shape[0] != len(self):
            return self.part(0, 2)
        counts = (labels != IGNORED).reshape(len(self), -1).sum(1)
        if not counts.any():
            return None
        most = counts.argsort(descending=True, stable=True)[:2]
        return self.only(sorted(most.tolist()))

    def twice(self) -> ExampleBatch:
        """The same examples and their repetition as padding."""

        def rows(tensor: Tensor) -> Tensor:
            own = tensor.dim() > 0 and tensor.shape[0] == len(self)
            return torch.cat([tensor, tensor]) if own else tensor

        inputs = tree_map_only(Tensor, rows, self.inputs)
        return ExampleBatch(inputs, self.ids * 2, len(self) + self.padding)

    def blank(self) -> ExampleBatch:
        """The same batch as padding alone."""
        return ExampleBatch(self.inputs, self.ids, len(self))


def batches_of_examples(
    data: Any, indices: Sequence[int], collator: Collator, batch_size: int
) -> Iterator[ExampleBatch]:
    """Collate the chosen examples of an indexable data set."""
    for start in range(0, len(indices), batch_size):
        ids = list(indices[start : start + batch_size])
        yield from collated(collator, [data[i] for i in ids], ids)


def collated(collator: Collator, examples: list[Any], ids: list[int]) -> Iterator[ExampleBatch]:
    """The examples as one batch; one by one where the collator packs them into fewer rows.

    Raises:
        ValueError: an example alone has several rows of labels.
    """
    inputs = as_mapping(collator(examples))
    labels = [inputs[name] for name in LABEL_NAMES if isinstance(inputs.get(name), Tensor)]
    if not labels or labels[0].dim() == 0 or labels[0].shape[0] == len(ids):
        yield ExampleBatch(inputs, ids)
    elif len(ids) > 1:
        for example, index in zip(examples, ids, strict=True):
            yield from collated(collator, [example], [index])
    else:
        raise ValueError(
            f"The data_collator makes {labels[0].shape[0]} rows of labels of one example; needed "
            "is one row for each example. Use another data_collator for the Fisher."
        )


def numbered_batches(data: Iterable[Any], num_samples: int | None) -> Iterator[ExampleBatch]:
    """Batches that come collated, cut off after `num_samples` examples."""
    seen = 0
    for raw in data:
        inputs = as_mapping(raw)
        size = batch_length(inputs)
        batch = ExampleBatch(inputs, list(range(seen, seen + size)))
        if num_samples is not None and seen + size > num_samples:
            batch = batch.part(0, num_samples - seen)
        if len(batch):
            yield batch
        seen += size
        if num_samples is not None and seen >= num_samples:
            return


def as_mapping(batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch is a {type(batch).__name__}; needed is a dict of the model's arguments with "
            "their labels. Give a data set of dicts, or a data_collator that makes them."
        )
    return dict(batch)


def batch_length(inputs: Mapping[str, Any]) -> int:
    """B, from the labels if there are any."""
    names = sorted(inputs, key=lambda name: "label" not in name)
    for name in names:
        if isinstance(inputs[name], Tensor) and inputs[name].dim():
            return int(inputs[name].shape[0])
    raise ValueError(f"A batch holds no tensors: {', '.join(inputs) or 'it is empty'}.")


def looks_collated(first: Any) -> bool:
    """Whether an element of a list is a batch rather than an example.

    In a batch the tensors have as many rows as there are labels, or one for all examples, and some
    tensor has further axes.
    """
    if not isinstance(first, Mapping):
        return False
    tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
    labels = next((tensors[name] for name in LABEL_NAMES if name in tensors), None)
    if labels is None or labels.dim() == 0:
        return False
    own = [tensor for tensor in tensors.values() if tensor.dim() and tensor.shape[0] != 1]
    if labels.shape[0] == 1:
        return not own and any(tensor.dim() > 1 for tensor in tensors.values())
    return all(tensor.shape[0] == labels.shape[0] for tensor in own) and any(
        tensor.dim() > 1 for tensor in own
    )
