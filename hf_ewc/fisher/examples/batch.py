"""Which examples are used, and in which batches: chosen once, for all processes, from the seed."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_ewc.fisher.examples.layout import PLAIN, Inseparable, Layout, Rows
from hf_ewc.fisher.examples.packed import documents_of
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
    """

    inputs: dict[str, Any]
    ids: list[int]
    padding: int = 0
    known_layout: Layout | None = None
    apart_because: str | None = None
    cut_from: ExampleBatch | None = None

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
        return ExampleBatch(taken, ids, known_layout=self.layout.only(examples))

    def pair(self) -> ExampleBatch | None:
        """The two examples with the most labels; None where none has any."""
        most = self.most_labelled()
        return None if most is None else self.only(sorted(most[:2]))

    def most_labelled(self) -> list[int] | None:
        """The places of the examples, those with most labels first; None where none has any."""
        labels = next((self.inputs[n] for n in LABEL_NAMES if n in self.inputs), None)
        if not isinstance(labels, Tensor) or labels.dim() == 0 or labels.shape[0] != len(self):
            return list(range(len(self)))
        counts = (labels != IGNORED).reshape(len(self), -1).sum(1)
        if not counts.any():
            return None
        most: list[int] = counts.argsort(descending=True, stable=True).tolist()
        return most

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
        return ExampleBatch(inputs, self.ids * 2, 1 + self.padding)

    def blank(self) -> ExampleBatch:
        """The same batch as padding alone."""
        return replace(self, padding=len(self))


def batches_of_examples(
    data: Any, indices: Sequence[int], collator: Collator, batch_size: int
) -> Iterator[ExampleBatch]:
    """Collate the chosen examples of an indexable data set."""
    for start in range(0, len(indices), batch_size):
        ids = list(indices[start : start + batch_size])
        yield from collated(collator, [data[i] for i in ids], ids)


def collated(collator: Collator, examples: list[Any], ids: list[int]) -> Iterator[ExampleBatch]:
    """The examples as one batch; one by one where the collator makes none that can be divided.

    Raises:
        ValueError: an example alone has several rows of labels.
    """
    yield from numbered(Collating(collator)(examples), ids)


@dataclass(frozen=True)
class Divided:
    """What a collator makes of some examples: a batch and how it divides, or each one alone."""

    batch: dict[str, Any]
    layout: Layout | None = None
    alone: list[dict[str, Any]] | None = None
    because: str | None = None


class Dropped(ValueError):
    """A collator makes nothing of an example."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"The data_collator leaves out examples: of one alone it makes nothing, and fails as "
            f"it does on none ({type(error).__name__}: {error!s:.200}). Needed is a row for each "
            "example. Leave such examples out of the data, or give another data_collator."
        )


@dataclass(frozen=True)
class Collating:
    """A collator that also says how its batch divides into the examples."""

    collator: Collator

    def __call__(self, examples: list[Any]) -> Divided:
        try:
            batch = self._collated(examples)
        except (TypeError, ValueError, RuntimeError) as error:
            return self._one_by_one(examples, error)
        if len(examples) == 1:
            return Divided(batch)
        if _packs(batch, len(examples)):
            return Divided(batch, alone=self._each_alone(examples))
        layout = Layout.by_stacking(batch, examples)
        if layout is not None and not layout.unconfirmed:
            return Divided(batch, layout)
        try:
            with same_random_numbers():
                first = self._collated(examples[:1])
                if layout is not None and layout.confirmed_by(batch, first):
                    return Divided(batch, replace(layout, unconfirmed=False))
                others = [self._collated([one]) for one in examples[1:]]
        except Exception:
            return Divided(batch)  # what it makes of one example cannot be known
        alone = [first, *others]
        _refuse_places_as_labels(batch, alone)
        try:
            return Divided(batch, Layout.by_examples(batch, alone))
        except Inseparable as reason:
            return Divided(batch, alone=alone, because=str(reason))

    def _collated(self, examples: list[Any]) -> dict[str, Any]:
        """Of copies: a collator may take columns out of examples, and is called again on them."""
        return as_mapping(self.collator([_copied(one) for one in examples]))

    def _each_alone(self, examples: list[Any]) -> list[dict[str, Any]]:
        try:
            return [self._collated([one]) for one in examples]
        except Exception as error:
            self._refuse_dropped(error)
            raise

    def _refuse_dropped(self, error: Exception) -> None:
        """Where the collator fails on an example as it does on none at all."""
        try:
            self._collated([])
        except Exception as of_none:
            if type(of_none) is type(error) and str(of_none) == str(error):
                raise Dropped(error) from error

    def _one_by_one(self, examples: list[Any], error: Exception) -> Divided:
        """Of a collator that can take one example at a time only."""
        if len(examples) == 1:
            self._refuse_dropped(error)
            raise error
        try:
            alone = self._each_alone(examples)
        except Dropped:
            raise
        except Exception:
            raise error from None
        because = f"the data_collator fails on several ({type(error).__name__}: {error!s:.200})"
        return Divided({}, alone=alone, because=because)


def _copied(example: Any) -> Any:
    """With arrays of its own, which a collator may write into."""
    if isinstance(example, MutableMapping):
        found = copy.copy(example)
        for name, value in example.items():
            if isinstance(value, (Tensor, np.ndarray, list, dict)):
                found[name] = _copied(value)
        return found
    if isinstance(example, list) and any(isinstance(v, (Tensor, np.ndarray)) for v in example):
        return [_copied(value) for value in example]
    if isinstance(example, Tensor):
        return example.clone()
    return copy.copy(example) if isinstance(example, (Mapping, list, np.ndarray)) else example


def numbered(divided: Divided, ids: list[int]) -> Iterator[ExampleBatch]:
    """What was collated, with the numbers of the examples.

    Raises:
        ValueError: an example alone has several rows of labels.
    """
    if divided.alone is None:
        batch = ExampleBatch(divided.batch, ids, known_layout=divided.layout)
        if len(ids) == 1:
            _require_one_row(divided.batch)
        yield batch
        return
    for inputs, index in zip(divided.alone, ids, strict=True):
        _require_one_row(inputs)
        yield ExampleBatch(inputs, [index], apart_because=divided.because)


def _refuse_places_as_labels(batch: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]) -> None:
    """Of a loss among the examples of a batch, as of pairs with the others as negatives."""
    for name in LABEL_NAMES:
        labels = batch.get(name)
        own = [each for one in alone if isinstance(each := one.get(name), Tensor)]
        if not isinstance(labels, Tensor) or len(own) < len(alone) or len(own) < 2:
            continue
        places = torch.arange(labels.numel()).view(labels.shape)
        if torch.equal(labels, places) and not any(bool(each.any()) for each in own):
            raise ValueError(
                f"The data_collator gives {len(alone)} examples the labels 0 to {len(alone) - 1}, "
                "and each of them 0 where it is alone: their places in the batch, as in a contrast "
                "of pairs with the other pairs. Such a loss is no likelihood of single examples, "
                "so that they have no Fisher. Give data with labels of each example, or "
                "log_likelihood=."
            )


def _packs(inputs: Mapping[str, Any], size: int) -> bool:
    """Whether the labels of several examples lie in fewer rows, or in more."""
    labels = [inputs[name] for name in LABEL_NAMES if isinstance(inputs.get(name), Tensor)]
    return bool(labels) and labels[0].dim() > 0 and labels[0].shape[0] != size


def _require_one_row(inputs: Mapping[str, Any]) -> None:
    if _packs(inputs, 1):
        name = next(name for name in LABEL_NAMES if isinstance(inputs.get(name), Tensor))
        raise ValueError(
            f"The data_collator makes {inputs[name].shape[0]} rows of labels of one example; "
            "needed is one row for each example. Use another data_collator for the Fisher."
        )


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards, of the random numbers of the CPU."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


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
