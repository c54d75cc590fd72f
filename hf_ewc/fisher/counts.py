"""What is counted as the batches of an estimate go by: examples, labels, how sure the model is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED
from hf_ewc.fisher.likelihood.categorical import Categorical
from hf_ewc.fisher.likelihood.distribution import Distribution, at_least_fp32
from hf_ewc.fisher.likelihood.independent import Bernoulli
from hf_ewc.fisher.likelihood.joint import Joint
from hf_ewc.precision import wide_sum, widened, widest

LOOKED_AT = 16
"""Labels of an example, evenly spaced, whose outputs are looked at: all would cost a tenth of the
passes of a language model."""


@dataclass(frozen=True)
class Counts:
    """Of this process so far.

    Args:
        examples: with at least one label.
        labels: over all examples and positions.
        sure: Σ over labels of max_c p(c | x), for those that are one of several classes.
        classed: how many labels these are.
    """

    examples: int = 0
    labels: int = 0
    sure: float = 0.0
    classed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.examples + other.examples,
            self.labels + other.labels,
            self.sure + other.sure,
            self.classed + other.classed,
        )

    @property
    def confidence(self) -> float | None:
        """The mean of max_c p(c | x) over all labels; None where some are not of classes.

        Of more than `LOOKED_AT` labels of an example every so-manieth stands for its neighbours.
        """
        return self.sure / self.labels if self.labels and self.classed == self.labels else None


@torch.no_grad()
def counted(distribution: Distribution, examples: int) -> Counts:
    """What a batch adds, `examples` of which count."""
    sure, classed = _certainty(distribution)
    return Counts(examples, distribution.num_labels, sure, classed)


def _certainty(distribution: Distribution) -> tuple[float, int]:
    """Σ max_c p(c | x), in fp64, over the labels that are one of several classes; their number."""
    if isinstance(distribution, Joint):
        found = [_certainty(factor) for factor in distribution.factors]
        return sum(sure for sure, _ in found), sum(number for _, number in found)
    if isinstance(distribution, Categorical):
        return _of_classes(distribution.logits, distribution.labels), distribution.num_labels
    if isinstance(distribution, Bernoulli):
        logits = at_least_fp32(distribution.outputs[distribution.there])
        return float(wide_sum(logits.abs().sigmoid())), distribution.num_labels
    return 0.0, 0


def _of_classes(logits: Tensor, labels: Tensor) -> float:
    """Σ max_c p_c over the labels; where an example has many, as if all were like some of them."""
    there = labels != IGNORED
    if labels.shape[1] <= LOOKED_AT:
        return float(wide_sum(_largest(logits)[there]))
    total = logits.new_zeros((), dtype=widest(logits.device))
    for own, positions in zip(logits, there, strict=True):
        labelled = positions.nonzero().flatten()
        if number := len(labelled):
            some = labelled[:: math.ceil(number / LOOKED_AT)]
            total += number * widened(_largest(own[some])).mean()
    return float(total)


def _largest(logits: Tensor) -> Tensor:
    """max_c p_c = 1 / Σ_c exp(l_c − max l), of shape (…) for logits (…, C)."""
    scores = at_least_fp32(logits)
    return (scores - scores.amax(-1, keepdim=True)).exp_().sum(-1).reciprocal_()
