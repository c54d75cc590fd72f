"""Rows in which several documents are packed: where each ends, and what of the row is its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy
from torch import Tensor, nn

from hf_ewc.fisher.labels import LABEL_NAMES

LENGTHS = "seq_lengths"  # of the documents in a row, as TRL notes them
POSITIONS = "position_ids"  # which begin again with each document
TOKENS = "input_ids"
# What a batch says of its packing besides: a document alone does without.
_OF_PACKING = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)


def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether positions that begin again begin a document, to which those before are unknown.

    So it is in the causal language models of `transformers`. An encoder sees the whole row,
    whatever its positions, as those of the second text of a pair.
    """
    generates: Any = getattr(model, "can_generate", None)
    if not callable(generates) or not generates():
        return False
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def are_lengths(row: Mapping[str, Any]) -> bool:
    """Whether a row's own lengths are those of documents that make it up."""
    lengths, tokens = row.get(LENGTHS), row.get(TOKENS, ())
    if not isinstance(lengths, (list, tuple)):
        return False
    return all(isinstance(n, int) and n > 0 for n in lengths) and sum(lengths) == len(tokens)


def lengths_by_position(row: Mapping[str, Any]) -> list[int]:
    """Lengths of a row's documents: positions count up from the first one's in each.

    A row of which that, or a label for each token, is not so, or with padding, is one document.
    """
    whole = [len(row.get(TOKENS, ()))]
    if not all(_of_tokens(row[name], *whole) for name in (POSITIONS, "labels") if name in row):
        return whole
    if POSITIONS not in row or not all(row.get("attention_mask", ())):
        return whole
    positions = numpy.asarray(row[POSITIONS])
    begins = numpy.flatnonzero(positions == positions[:1])
    goes_on = numpy.diff(positions) == 1
    if len(begins) < 2 or not (goes_on | (positions[1:] == positions[0])).all():
        return whole
    return [end - begin for begin, end in pairwise([*begins.tolist(), *whole])]


def document(row: Mapping[str, Any], lengths: list[int], number: int) -> dict[str, Any]:
    """Document `number` of a row, with its part of all that is there for each token.

    Positions that count from 0 are left out: they are the model's own, and collators do not pad
    them.
    """
    start, size = sum(lengths[:number]), lengths[number]
    own = {
        name: value[start : start + size]
        for name, value in row.items()
        if hasattr(value, "__len__") and len(value) == sum(lengths) and name != LENGTHS
    }
    noted = {LENGTHS: [size]} if LENGTHS in row else {}
    found = {**row, **own, **noted}
    if POSITIONS in own and numpy.array_equal(own[POSITIONS], range(size)):
        del found[POSITIONS]
    return found


def documents_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents that are packed in the rows of a batch, each as a batch of one; none if none.

    The Fisher is a mean over examples of squares: a row as one example would give the square of
    its documents' sum.
    """
    inputs = {name: value for name, value in batch.items() if name not in _OF_PACKING}
    tokens = inputs.get(TOKENS)
    labelled = any(name in inputs for name in LABEL_NAMES)
    if not labelled or not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return []
    if any(not isinstance(v, Tensor) or v.shape[:2] != tokens.shape for v in inputs.values()):
        return []
    found = []
    for place in range(len(tokens)):
        row = {name: value[place] for name, value in inputs.items()}
        lengths = lengths_by_position({name: value.tolist() for name, value in row.items()})
        found += [document(row, lengths, number) for number in range(len(lengths))]
    if len(found) == len(tokens):
        return []
    return [{name: value.unsqueeze(0) for name, value in one.items()} for one in found]


def _of_tokens(value: Any, number: int) -> bool:
    """Whether there is one number for each token of a row."""
    if not hasattr(value, "__len__") or len(value) != number:
        return False
    return number == 0 or not hasattr(value[0], "__len__")
