"""A batch of examples that can be taken out of it again, and batches that come collated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_ewc.fisher.examples.layout import PLAIN, Inseparable, Layout
from hf_ewc.fisher.examples.packed import documents_of
from hf_ewc.fisher.examples.shares import Rows
from hf_ewc.fisher.labels import IGNORED, LABEL_NAMES

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class ExampleBatch:
    """A collated batch, and a number for each example that is the same on any process.

    Args:
        inputs: by name, labels among them.
        ids: the examples' numbers.
        padding: how many examples, the last ones, repeat others and count nothing.
        known_layout: how the inputs divide, where that is known; by their sizes if None.
        apart_because: why these examples could not be collated into one batch with others.
        cut_from: the batch that came collated and of which these were wanted alone.
        padded_here: whether padding in it is the collator's, of examples that have none alone.
    """

    inputs: dict[str, Any]
    ids: list[int]
    padding: int = 0
    known_layout: Layout | None = None
    apart_because: str | None = None
    cut_from: ExampleBatch | None = None
    padded_here: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> ExampleBatch:
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), self.inputs)
        whole = None if self.cut_from is None else self.cut_from.to(device)
        return replace(self, inputs=moved, cut_from=whole)

    @cached_property
    def layout(self) -> Layout | Inseparable:
        """How the inputs divide, or what of them does not."""
        if self.known_layout is not None:
            return self.known_layout
        try:
            return Layout.by_size(self.inputs, len(self))
        except Inseparable as reason:
            return reason

    @property
    def divisible(self) -> bool:
        """Whether examples can be taken out."""
        return isinstance(self.layout, Layout)

    @property
    def doubtful(self) -> bool:
        """Whether what belongs to which example is a guess that could mislead."""
        return len(self) > 1 and isinstance(self.layout, Layout) and self.layout.doubtful

    @property
    def unconfirmed(self) -> bool:
        """Whether sizes that could be meant otherwise say what belongs to which example."""
        if self.cut_from is not None:
            return self.cut_from.unconfirmed
        return len(self) > 1 and isinstance(self.layout, Layout) and self.layout.unconfirmed

    @property
    def uneven(self) -> str | None:
        """Why this is not a row for each example in every input; None where it is."""
        if len(self) == 1:
            return None
        if isinstance(self.layout, Inseparable):
            return str(self.layout)
        return self.layout.uneven(self.inputs)

    def require_label_rows(self) -> None:
        """Raise a `ValueError` unless each example has one row of the labels."""
        if len(self) == 1 or isinstance(self.layout, Inseparable):
            return
        row_each = Rows((1,) * len(self))
        for name in LABEL_NAMES:
            labels, share = self.inputs.get(name), self.layout.shares.get(name)
            if isinstance(labels, Tensor) and share != row_each:
                raise ValueError(
                    f"In {name!r} of the shape {tuple(labels.shape)} the data_collator gives the "
                    f"{len(self)} examples no row each, as where they lie along a later axis; "
                    "needed is one row for each example. Use another data_collator for the Fisher."
                )

    def part(self, start: int, stop: int) -> ExampleBatch:
        return self.only(range(len(self))[start:stop])

    def only(self, examples: Sequence[int]) -> ExampleBatch:
        """The batch of these examples, by their places in this one.

        Raises:
            ValueError: examples cannot be taken out of this batch.
        """
        examples = list(examples)
        if examples == list(range(len(self))):
            return self
        ids = [self.ids[n] for n in examples]
        if isinstance(self.layout, Inseparable):
            raise ValueError(
                f"The examples of a batch cannot be taken apart: {self.layout}. Use batch_size=1 "
                "(fisher_batch_size=1), give a data set of examples with its data_collator, or "
                "batches of one example."
            )
        taken = self.layout.take(self.inputs, examples)
        layout = self.layout.only(examples)
        return ExampleBatch(taken, ids, known_layout=layout, padded_here=self.padded_here)

    def pair(self) -> ExampleBatch | None:
        """The two examples with the most labels; None where none has any."""
        most = self.most_labelled()
        return None if most is None else self.only(sorted(most[:2]))

    def telling_pair(self) -> tuple[int, int] | None:
        """The last and the first place of examples with about the most labels; None without any.

        What mixes examples in their order, such as experts that take the first ones, leaves the
        first example as it is alone, and most of the last.
        """
        counts = self._label_counts() or [1] * len(self)
        if not any(counts):
            return None
        top = [n for n, count in enumerate(counts) if 2 * count >= max(counts)]
        if len(top) == 1:
            rest = (n for n in range(len(self)) if n != top[0])
            return top[0], max(rest, key=lambda n: counts[n])
        return top[-1], top[0]

    def most_labelled(self) -> list[int] | None:
        """The places of the examples, those with most labels first; None where none has any."""
        counts = self._label_counts()
        if counts is None:
            return list(range(len(self)))
        if not any(counts):
            return None
        return sorted(range(len(self)), key=lambda n: -counts[n])

    def _label_counts(self) -> list[int] | None:
        """How many labels each example has; None where they are no row for each."""
        labels = next((self.inputs[n] for n in LABEL_NAMES if n in self.inputs), None)
        if not isinstance(labels, Tensor) or labels.dim() == 0 or labels.shape[0] != len(self):
            return None
        counts: list[int] = (labels != IGNORED).reshape(len(self), -1).sum(1).tolist()
        return counts

    def at_least_two(self) -> ExampleBatch:
        """One example with its repetition as padding: where examples lie is seen from two.

        As it is where it has more, or something that is not a row for each example.
        """
        tensors = [v for v in tree_leaves(self.inputs) if isinstance(v, Tensor) and v.dim()]
        plain = all(isinstance(v, (Tensor, *PLAIN)) for v in self.inputs.values())
        if len(self) > 1 or not plain or any(tensor.shape[0] != 1 for tensor in tensors):
            return self

        def rows(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor]) if tensor.dim() else tensor

        inputs = tree_map_only(Tensor, rows, self.inputs)
        padding = 1 + self.padding
        return ExampleBatch(inputs, self.ids * 2, padding, padded_here=self.padded_here)

    def blank(self) -> ExampleBatch:
        """The same batch as padding alone."""
        return replace(self, padding=len(self))


def numbered_batches(
    data: Iterable[Any], num_samples: int | None, in_documents: bool = False
) -> Iterator[ExampleBatch]:
    """Batches that come collated, cut off after `num_samples` examples.

    Those of packed rows are their documents, where the model keeps these apart.
    """
    seen = 0
    batches = map(as_mapping, data)
    for inputs in _unpacked(batches) if in_documents else batches:
        _refuse_example(inputs)
        size = batch_length(inputs)
        batch = ExampleBatch(inputs, list(range(seen, seen + size)))
        if num_samples is not None and seen + size > num_samples:
            batch = replace(batch.part(0, num_samples - seen), cut_from=batch)
        if len(batch):
            yield batch
        seen += size
        if num_samples is not None and seen >= num_samples:
            return


def _refuse_example(inputs: Mapping[str, Any]) -> None:
    labels = next((v for n in LABEL_NAMES if (v := inputs.get(n)) is not None), None)
    if isinstance(labels, (int, float)) or (isinstance(labels, Tensor) and labels.dim() == 0):
        raise ValueError(
            f"The data are an iterable whose elements have one label ({labels!r:.40}): each is an "
            "example where a batch of them is needed. Give a data set, such as list(data), or a "
            "data_collator."
        )


def _unpacked(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for inputs in batches:
        yield from documents_of(inputs) or [inputs]


def as_mapping(batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch is a {type(batch).__name__}; needed is a dict of the model's arguments with "
            "their labels. Give a data set of dicts, or a data_collator that makes them."
        )
    return dict(batch)


def batch_length(inputs: Mapping[str, Any]) -> int:
    """B, from the labels if there are any."""
    for name in sorted(inputs, key=lambda name: "label" not in name):
        value = inputs[name]
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
        if name in LABEL_NAMES and isinstance(value, (list, tuple)):
            return len(value)
    raise ValueError(f"A batch holds no tensors: {', '.join(inputs) or 'it is empty'}.")


def may_be_batch(first: Any) -> bool:
    """Whether an element of a list has labels in rows, as a batch has, and some examples."""
    if not isinstance(first, Mapping):
        return False
    labels = next((v for n in LABEL_NAMES if isinstance(v := first.get(n), Tensor)), None)
    return labels is not None and labels.dim() > 0


def looks_collated(first: Any) -> bool:
    """Whether an element of a list is a batch rather than an example.

    In a batch the tensors have as many rows as there are labels, or one for all examples, and some
    tensor has further axes.
    """
    if not isinstance(first, Mapping):
        return False
    tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
    if not may_be_batch(first):
        return False
    labels = next(tensors[name] for name in LABEL_NAMES if name in tensors)
    own = [tensor for tensor in tensors.values() if tensor.dim() and tensor.shape[0] != 1]
    if labels.shape[0] == 1:
        return not own and any(tensor.dim() > 1 for tensor in tensors.values())
    return all(tensor.shape[0] == labels.shape[0] for tensor in own) and any(
        tensor.dim() > 1 for tensor in own
    )
