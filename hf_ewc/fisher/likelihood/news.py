"""What a batch has that a model's loss may treat in a way of its own, such as a first padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.labels import IGNORED, LABEL_NAMES, Batch, are_there

# Labels that losses leave out, or that stand for something else than a class.
_SPECIAL = (0, 255)
# Each label by itself is a fact where there are no more than so many.
_FEW = 32


class News:
    """Remembers what batches had, and finds the examples of one with something else.

    Args:
        special: further labels that may have a meaning of their own, such as a pad token's.
    """

    def __init__(self, special: tuple[int, ...] = ()) -> None:
        self._special = {*_SPECIAL, *special}
        self._known: set[str] = set()
        self._labels: set[int] = set()
        self._largest = 0.0
        self._watched: list[str] = []

    def watch(self, names: list[str]) -> None:
        """Look at these inputs too, which the loss has for itself."""
        self._watched = names

    def note(self, batch: Batch) -> None:
        """What this one has is known from now on."""
        for fact, _ in self._facts(batch):
            self._known.add(fact)
        for labels in _labels_of(batch):
            there = labels[are_there(labels)]
            if labels.is_floating_point():
                largest = float(there.abs().max()) if there.numel() else 0.0
                self._largest = max(self._largest, largest)
            elif len(self._labels) <= _FEW:
                self._labels |= set(there.unique()[: _FEW + 1].tolist())

    def of(self, batch: ExampleBatch) -> tuple[str, int] | None:
        """What is new in the example with most that is, in words, and its place; None for none."""
        new = [(fact, rows) for fact, rows in self._facts(batch.inputs) if fact not in self._known]
        new = [(fact, rows) for fact, rows in new if len(rows) == len(batch)]
        if not new:
            return None
        place = int(torch.stack([rows for _, rows in new]).sum(0).argmax())
        return " and ".join(dict.fromkeys(fact for fact, rows in new if rows[place])), place

    def _facts(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Each in words, and which examples have it."""
        for name, value in batch.items():
            if name.endswith("mask") and isinstance(value, Tensor) and value.dim() > 1:
                yield from _if_any(f"a 0 in {name}", value == 0)
        for name in self._watched:
            yield from _values_of(name, batch.get(name))
        for labels in _labels_of(batch):
            if labels.dim() == 0:
                continue
            if labels.is_floating_point():
                yield from self._of_floats(labels)
            else:
                yield from self._of_integers(labels)

    def _of_integers(self, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from _if_any("labels below 0", (labels < 0) & (labels != IGNORED))
        for value in sorted(self._special):
            yield from _if_any(f"a label of {value}", labels == value)
        values = labels[labels >= 0].unique()
        if len(self._labels) <= _FEW and len(values) <= _FEW:
            for value in values.tolist():
                if value not in self._labels:
                    yield from _if_any(f"a label of {value}", labels == value)

    def _of_floats(self, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
        there = are_there(labels)
        yield from _if_any("labels below 0", there & (labels < 0))
        yield from _if_any("labels of 0 or 1", (labels == 0) | (labels == 1))
        yield from _if_any("labels that are not 0 or 1", there & (labels != 0) & (labels != 1))
        yield from _if_any("labels of −1", there & (labels == -1))
        far = there & (labels.abs() > 2 * self._largest)
        if self._largest:
            yield from _if_any(f"labels beyond ±{2 * self._largest:.3g}", far)


def _values_of(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Each of few values; of many, or of floats, whether there is a 0."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return
    values = value.unique()
    if value.is_floating_point() or len(values) > _FEW:
        yield from _if_any(f"a 0 in {name}", value == 0)
        return
    for each in values.tolist():
        yield from _if_any(f"a {each} in {name}", value == each)


def _if_any(fact: str, where: Tensor) -> Iterator[tuple[str, Tensor]]:
    rows = where.reshape(len(where), -1).any(1)
    if bool(rows.any()):
        yield fact, rows


def _labels_of(batch: Batch) -> list[Tensor]:
    return [v for name in LABEL_NAMES if isinstance(v := batch.get(name), torch.Tensor)]
