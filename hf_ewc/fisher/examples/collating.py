"""How examples become batches by a collator, which also says how its batch divides into them."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ewc.fisher.examples.batch import Collator, ExampleBatch, as_mapping
from hf_ewc.fisher.examples.layout import Inseparable, Layout
from hf_ewc.fisher.labels import LABEL_NAMES


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
    padded_here: bool = False


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
        come_padded = any(map(_begins_with_padding, examples))
        return replace(self._divided(examples), padded_here=not come_padded)

    def _divided(self, examples: list[Any]) -> Divided:
        try:
            batch = self._collated(examples)
        except Exception as error:
            _refuse_nothing(examples, error)
            if not isinstance(error, (TypeError, ValueError, RuntimeError)):
                raise
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


def _begins_with_padding(example: Any) -> bool:
    """Whether a text comes with padding before it."""
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if not isinstance(mask, (Tensor, np.ndarray, list, tuple)) or len(mask) == 0:
        return False
    return np.size(mask[0]) == 1 and not bool(mask[0])


def numbered(divided: Divided, ids: list[int]) -> Iterator[ExampleBatch]:
    """What was collated, with the numbers of the examples.

    Raises:
        ValueError: an example alone has several rows of labels.
    """
    if divided.alone is None:
        batch = ExampleBatch(
            divided.batch, ids, known_layout=divided.layout, padded_here=divided.padded_here
        )
        if len(ids) == 1:
            _require_one_row(divided.batch)
        yield batch
        return
    for inputs, index in zip(divided.alone, ids, strict=True):
        _require_one_row(inputs)
        yield ExampleBatch(inputs, [index], apart_because=divided.because)


def _refuse_nothing(examples: Sequence[Any], error: Exception) -> None:
    """Where the collator fails on items that are None."""
    if any(one is None for one in examples):
        raise TypeError(
            f"The data set gives None in place of an example, which the data_collator does not "
            f"take ({type(error).__name__}: {error!s:.200}). Leave such items out of the data, or "
            "give a data_collator that does."
        ) from error


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
