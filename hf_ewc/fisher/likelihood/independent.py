"""Outputs with a label each, independent of each other: yes/no labels and regression."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.labels import are_there
from hf_ewc.fisher.likelihood.choices import Choices
from hf_ewc.fisher.likelihood.distribution import (
    Distribution,
    at_least_fp32,
    numbers_like,
    one_by_one,
)
from hf_ewc.precision import widened

Own = TypeVar("Own", bound="Independent")


@dataclass(frozen=True)
class Independent(Distribution):
    """A label for each output: `outputs` (B, D), `labels` (B, D), NaN or −100 where missing."""

    outputs: Tensor
    labels: Tensor

    @property
    def there(self) -> Tensor:
        """(B, D) bool: the labels that are not missing."""
        return are_there(self.labels)

    @property
    def labelled(self) -> Tensor:
        return self.there.any(1)

    @property
    def num_labels(self) -> int:
        return int(self.there.sum())

    @property
    def num_positions(self) -> int:
        return self.labels.numel()

    @property
    def num_exact_passes(self) -> int:
        weights = self.deviations()
        return int((weights > 0).sum(1).max()) if weights.numel() else 0

    def deviations(self) -> Tensor:
        """(B, D): E[(∂ log p / ∂ output)²]^½ of each output, 0 where its label is missing."""
        raise NotImplementedError

    def exact(self, choices: Choices) -> Iterator[Tensor]:
        outputs = at_least_fp32(self.outputs)
        yield from one_by_one(outputs, self.deviations().to(outputs.dtype))

    def graph_output(self) -> Tensor:
        return self.outputs

    def first_example(self: Own) -> Own:
        return replace(self, outputs=self.outputs[:1], labels=self.labels[:1])

    def without(self: Own, padding: Tensor) -> Own:
        labels = at_least_fp32(self.labels).masked_fill(padding.unsqueeze(1), math.nan)
        return replace(self, labels=labels)

    def _present(self) -> tuple[Tensor, Tensor]:
        """The outputs whose labels are there, and these labels."""
        outputs, there = at_least_fp32(self.outputs), self.there
        return outputs[there], self.labels[there].to(outputs.dtype)


class Bernoulli(Independent):
    """Independent yes/no labels: the outputs are logits, the labels in [0, 1]."""

    def empirical(self) -> Tensor:
        logits, labels = self._present()
        return -F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")

    def sampled(self, choices: Choices) -> Tensor:
        rows = numbers_like(choices, self.outputs) < self.outputs.detach().sigmoid()
        drawn = torch.stack([choices.settled(n, row) for n, row in enumerate(rows)])
        labels = widened(drawn).masked_fill(~self.there, math.nan)
        return replace(self, labels=labels).empirical()

    def deviations(self) -> Tensor:
        """The variance of label d is p_d (1 − p_d): G_n = √(p_d (1 − p_d)) ∂l_d."""
        logits = widened(self.outputs.detach())
        return (logits.sigmoid() * (-logits).sigmoid()).sqrt() * self.there


class Gaussian(Independent):
    """Regression with unit variance, log p = −½ (y − f)²: the outputs are the means f."""

    def empirical(self) -> Tensor:
        means, labels = self._present()
        return -0.5 * (labels - means).square().sum()

    def sampled(self, choices: Choices) -> Tensor:
        noise = math.sqrt(2.0) * torch.erfinv(2.0 * numbers_like(choices, self.outputs) - 1.0)
        means, _ = self._present()
        return (means * noise[self.there].to(means.dtype)).sum()

    def deviations(self) -> Tensor:
        """E[(y − f)²] = 1 for each output: G_n = ∂f_d."""
        return widened(self.there)
