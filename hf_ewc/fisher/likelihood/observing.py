"""The forward of a model with labels, true and made up, to see what its loss is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.labels import IGNORED, Batch, are_there, label_name
from hf_ewc.fisher.likelihood.forward import Forward, Outputs
from hf_ewc.fisher.likelihood.made_up_labels import filled, made_up, possible_classes
from hf_ewc.fisher.likelihood.own_loss import Observation
from hf_ewc.fisher.likelihood.parts import Parts
from hf_ewc.fisher.memory import is_out_of_memory

_SIDES = ("start", "end")
# Positions of a text that are enough to see a language model's loss.
_FEW_POSITIONS = 64


def few_examples(batch: ExampleBatch) -> tuple[list[int] | None, Batch]:
    """Two examples, and where they are in the batch: with most labels, and most that are alike.

    A label that a loss leaves out (as of padding, by an `ignore_index`) stands often in a text. A
    single example is taken twice: weights of classes show where labels differ. Examples that may
    hang together are all taken, with None for their places.
    """
    if len(batch) == 1:
        return [0] * len(twice := batch.at_least_two()), twice.inputs
    if batch.uneven is not None or batch.doubtful:
        return None, batch.inputs
    first, *others = batch.most_labelled() or [-1]
    if first < 0:
        return None, batch.inputs
    places = sorted([first, *_with_most_alike(batch.inputs, others)])
    return places, batch.only(places).inputs


def _with_most_alike(inputs: Batch, places: list[int]) -> list[int]:
    """Of these examples the one in which one label stands most often; the first of several."""
    name = label_name(inputs)
    labels = None if name is None else inputs[name]
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return places[:1]
    rows = [labels[place].flatten() for place in places]
    often = [_most_alike(row[row != IGNORED]) for row in rows]
    return [places[often.index(max(often))]] if places else []


def _most_alike(labels: Tensor) -> int:
    """How often the most frequent of them is there."""
    return int(labels.unique(return_counts=True)[1].max()) if labels.numel() else 0


def few_positions(inputs: Batch) -> Batch | None:
    """The same part of each text, one with labels of all of them; None where there is none.

    For causal language models, which take texts of any length, and whose outputs are large.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] <= _FEW_POSITIONS:
        return None
    if any(not isinstance(v, Tensor) or v.shape != labels.shape for v in inputs.values()):
        return None
    there = are_there(labels).float().unsqueeze(1)
    window = there.new_ones(1, 1, _FEW_POSITIONS)
    counts = torch.nn.functional.conv1d(there, window).squeeze(1).amin(0)
    if counts.max() < 2:
        return None
    start = int(counts.argmax())
    return {name: value[:, start : start + _FEW_POSITIONS] for name, value in inputs.items()}


class Observer:
    """Observes the loss of a model on one batch.

    Args:
        forward: runs the model.
        batch: a few examples with labels.
        parts: of the model, of which a forward with made-up labels runs only what is new.
        known: whether the parts have noted a forward on the batch.
    """

    def __init__(
        self, forward: Forward, batch: Batch, parts: Parts, *, known: bool = False
    ) -> None:
        self._forward = forward
        self._parts = parts
        self._known = known
        self._batch = _in_wide_types(batch)
        self._first: Outputs | None = None

    @torch.no_grad()
    def observe(self, turns: range) -> list[Observation]:
        """On the true labels at turn 0, on made-up ones at any other; none where it fails."""
        found = []
        for turn in turns:
            batch = self._batch if turn == 0 else self._relabelled(turn)
            outputs = self._attempt(batch)
            if outputs is None and turn == 0:
                batch = self._batch = _as_numbers(self._batch)
                outputs = self._attempt(batch)
            if outputs is None:
                break
            if turn == 0 and self._is_dense(outputs) and _any_missing(batch):
                batch = self._batch = _as_numbers(self._batch, keep_type=True)
                with self._parts.repeated():
                    outputs = self._forward.with_labels(batch)
            self._first = self._first or outputs
            loss = math.nan if outputs.loss is None else float(outputs.loss.mean())
            found.append(Observation(batch, outputs, loss))
        return found

    def _attempt(self, batch: Batch) -> Outputs | None:
        """None where the model's loss does not take such labels."""
        parts = self._parts.repeated() if self._known else self._parts.noted()
        try:
            with parts:
                found = self._forward.with_labels(batch)
            self._known = True
            return found
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None

    def _relabelled(self, turn: int) -> Batch:
        name = label_name(self._batch)
        if name is None:
            return {**self._batch, **self._other_positions(turn)}
        holes = self._forward.makes_decoder_inputs(self._batch)
        labels = self._batch[name]
        return {**self._batch, name: made_up(labels, self._classes(labels), turn, holes=holes)}

    def _other_positions(self, turn: int) -> Batch:
        found = {}
        for i, side in enumerate(_SIDES):
            name = f"{side}_positions"
            scores = None if self._first is None else self._first.named(f"{side}_logits")
            if scores is not None and name in self._batch:
                classes = possible_classes(scores, -1)
                found[name] = made_up(self._batch[name], classes, 2 * turn + i, holes=False)
        return found

    def _classes(self, labels: Tensor) -> Tensor | None:
        """What the labels may be, where the shapes say that they are classes."""
        logits = None if self._first is None else self._first.logits
        if logits is None or labels.is_floating_point():
            return None
        if logits.dim() == 4 and labels.dim() == 3:
            return possible_classes(logits, 1) if logits.shape[1] > 1 else torch.arange(2)
        if labels.numel() == logits[..., 0].numel() and logits.shape[-1] > 1:
            return possible_classes(logits, -1)
        return None

    def _is_dense(self, outputs: Outputs) -> bool:
        name = label_name(self._batch)
        if name is None or outputs.logits is None:
            return False
        return bool(outputs.logits.numel() == self._batch[name].numel())


def _in_wide_types(batch: Batch) -> Batch:
    """Labels as losses take them: int64, or floats without missing ones."""
    found = dict(batch)
    for name in ("labels", "label", "label_ids", "start_positions", "end_positions"):
        labels = batch.get(name)
        if isinstance(labels, Tensor):
            found[name] = filled(labels) if labels.is_floating_point() else labels.long()
    return found


def _as_numbers(batch: Batch, *, keep_type: bool = False) -> Batch:
    """Integer labels as yes or no: without missing ones, and as floats."""
    name = label_name(batch)
    if name is None:
        return batch
    labels = filled(batch[name])
    return {**batch, name: labels if keep_type else labels.float()}


def _any_missing(batch: Batch) -> bool:
    name = label_name(batch)
    return name is not None and not bool(are_there(batch[name]).all())


def has_labels(batch: Batch) -> bool:
    """Whether some label of the batch is there."""
    names = ("labels", "label", "label_ids", "start_positions", "end_positions")
    given = [batch[name] for name in names if isinstance(batch.get(name), Tensor)]
    return any(bool(are_there(labels).any()) for labels in given)
