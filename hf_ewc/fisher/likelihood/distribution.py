"""log p(y | x) as the models of `transformers` define it, and the expectations over y.

Each distribution turns the model's outputs on a batch into scalar objectives. Backpropagating an
objective gives, for every example n, a vector G_n; the Fisher's contribution of the batch is the
sum of G_n² over examples and objectives. Independent positions of one example have scores of mean
zero, so their squared scores add up in expectation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_ewc.fisher.likelihood.choices import Choices
from hf_ewc.precision import uniforms_on


class Distribution(ABC):
    """p(y | x) of a batch, from outputs that carry a graph.

    Classes and yes/no labels that the model gives the probability 0 take no pass.
    """

    @property
    @abstractmethod
    def labelled(self) -> Tensor:
        """(B,) bool: the examples with at least one label that is there."""

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """How many labels of the batch are there, over all examples and positions."""

    @property
    @abstractmethod
    def num_positions(self) -> int:
        """How many labels there could be."""

    @property
    @abstractmethod
    def num_exact_passes(self) -> int:
        """How many backward passes the exact expectation takes at most."""

    @abstractmethod
    def empirical(self) -> Tensor:
        """Σ_n log p(y_n | x_n), y_n the true label: G_n is its score."""

    @abstractmethod
    def sampled(self, choices: Choices) -> Tensor:
        """Σ_n log p(ỹ_n | x_n) with ỹ_n ~ p(· | x_n)."""

    @abstractmethod
    def exact(self, choices: Choices) -> Iterator[Tensor]:
        """Objectives whose squared gradients add up to E_y[(∂ log p(y | x_n))²]."""

    @abstractmethod
    def graph_output(self) -> Tensor:
        """An output of the model that carries its graph."""

    @abstractmethod
    def first_example(self) -> Distribution:
        """Of the first example alone."""

    @abstractmethod
    def without(self, padding: Tensor) -> Distribution:
        """No label for the examples that are `padding`, (B,) bool."""

    def losses(self) -> list[Tensor]:
        """−log p of the batch as losses state it: means over labels and positions, and the sum."""
        total = -self.empirical()
        return [total / max(count, 1) for count in (self.num_labels, self.num_positions, 1)]


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def numbers_like(choices: Choices, like: Tensor) -> Tensor:
    """A uniform number for each entry of `like`, (B, D), by the example that it is of."""
    rows = [choices.uniforms(like.shape[-1], n) for n in range(like.shape[0])]
    return uniforms_on(like.device, torch.stack(rows))


def one_by_one(outputs: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """For i = 0, 1, …: the sum over examples of the i-th output that has a weight, times it.

    Args:
        outputs: (B, D) with a graph; those without a weight may be infinite.
        weights: (B, D), not negative.
    """
    order = weights.argsort(1, descending=True)
    for i in range(int((weights > 0).sum(1).max()) if weights.numel() else 0):
        column = order[:, i : i + 1]
        factor = weights.gather(1, column)
        yield (outputs.gather(1, column).masked_fill(factor == 0, 0.0) * factor).sum()
