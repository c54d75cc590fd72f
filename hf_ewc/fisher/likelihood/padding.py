"""Padding before a text, of which a causal language model predicts the first token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED, Batch, label_name, labels_in
from hf_ewc.fisher.likelihood.readings import attention_of


def begins_with_padding(batch: Batch) -> bool:
    """Whether padding stands before a text, by its attention mask."""
    return bool(_after_padding(batch).any())


def predicted_from_text(batch: Batch) -> Batch:
    """Without the label of a text's first token, where padding stands before it.

    Shifted, it would be predicted from the padding, and it is predicted from nothing in the text
    alone: what counts of an example would depend on the others of its batch.
    """
    labels = labels_in(batch).masked_fill(_after_padding(batch), IGNORED)
    return {**batch, str(label_name(batch)): labels}


def most_padded(batch: Batch) -> tuple[int, Batch | None]:
    """The place of the text with most padding before it, and that text without it.

    None in place of the text where there is more than tokens and what goes with each.
    """
    first = _after_padding(batch).int().argmax(1)
    place = int(first.argmax())
    shape = labels_in(batch).shape
    alone = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if any(value.shape != shape for value in alone.values()):
        return place, None
    cut = {name: value[place : place + 1, int(first[place]) :] for name, value in alone.items()}
    return place, {**batch, **cut}


def _after_padding(batch: Batch) -> Tensor:
    """Where a token is that is attended to, behind one that is not."""
    labels = labels_in(batch)
    mask = attention_of(batch, labels)
    if mask is None or labels.dim() != 2:
        return labels.new_zeros(labels.shape, dtype=torch.bool)
    return F.pad(mask[:, :-1] == 0, (1, 0)) & (mask != 0)
