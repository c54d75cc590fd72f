"""Which labels a model's loss leaves out by a value of its own, such as another `ignore_index`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED, label_name
from hf_ewc.fisher.likelihood.own_loss import Observation, misfit, rounding
from hf_ewc.fisher.likelihood.readings import Reading

# Values of labels that are tried, the least first.
_MOST = 300


def label_left_out(observed: Sequence[Observation], candidates: Sequence[Reading]) -> int | None:
    """The label without which the losses are −log p of a candidate; None where there is none."""
    name = label_name(observed[0].batch)
    if name is None or observed[0].batch[name].is_floating_point():
        return None
    tolerance = rounding(observed)
    finite = [o for o in observed if math.isfinite(o.loss)]
    for value in _values([o.batch[name] for o in observed]):
        others = [_without(o, name, value) for o in finite]
        errors = (misfit(c.read, others, tolerance, further_term=False) for c in candidates)
        if min(errors) <= tolerance:
            return value
    return None


def _values(labels: Sequence[Tensor]) -> list[int]:
    found: list[int] = torch.cat([own[own != IGNORED] for own in labels]).unique().tolist()
    return found[:_MOST]


def _without(observed: Observation, name: str, value: int) -> Observation:
    labels = observed.batch[name]
    labels = labels.masked_fill(labels == value, IGNORED)
    return replace(observed, batch={**observed.batch, name: labels})
