"""log p(y | x) as the models of `transformers` define it, and the expectations over y.

Each distribution turns the model's outputs on a batch into scalar objectives. Backpropagating an
objective gives, for every example n, a vector G_n; the Fisher's contribution of the batch is the
sum of G_n² over examples and objectives. Independent positions of one example have scores of mean
zero, so their squared scores add up in expectation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED

# (count, example) → `count` uniform numbers that depend on the example and the seed alone.
Uniforms = Callable[[int, int], Tensor]


class Distribution(ABC):
    """p(y | x) of a batch, from outputs that carry a graph."""

    @property
    @abstractmethod
    def labelled(self) -> Tensor:
        """(B,) bool: the examples with at least one labelled position."""

    @property
    @abstractmethod
    def num_exact_passes(self) -> int:
        """How many backward passes the exact expectation takes at most."""

    @abstractmethod
    def empirical(self) -> Tensor:
        """Σ_n log p(y_n | x_n), y_n the true label: G_n is its score."""

    @abstractmethod
    def sampled(self, uniforms: Uniforms) -> Tensor:
        """Σ_n log p(ỹ_n | x_n) with ỹ_n ~ p(· | x_n)."""

    @abstractmethod
    def exact(self) -> Iterator[Tensor]:
        """Objectives whose squared gradients add up to E_y[(∂ log p(y | x_n))²]."""

    @abstractmethod
    def graph_output(self) -> Tensor:
        """An output of the model that carries its graph."""

    def first_example(self) -> Distribution:
        """What says of the first example alone how many passes the expectation takes."""
        return self

    @abstractmethod
    def without(self, padding: Tensor) -> Distribution:
        """No label or no gradient for the examples that are `padding`, (B,) bool."""


@dataclass(frozen=True)
class Categorical(Distribution):
    """A class at each position: `logits` (B, T, C), `labels` (B, T), −100 where unlabelled."""

    logits: Tensor
    labels: Tensor

    @property
    def labelled(self) -> Tensor:
        return (self.labels != IGNORED).any(1)

    @property
    def num_exact_passes(self) -> int:
        positions = int((self.labels != IGNORED).sum(1).max()) if self.labels.numel() else 0
        # Without labels nothing says how many there will be: as many as there are positions.
        return (positions or self.labels.shape[1]) * (self.logits.shape[-1] - 1)

    def empirical(self) -> Tensor:
        return self._log_probability(self.labels)

    def sampled(self, uniforms: Uniforms) -> Tensor:
        drawn = self.labels.clone()
        for n, positions in enumerate(self.labels != IGNORED):
            draws = uniforms(int(positions.sum()), n).to(self.logits.device)
            drawn[n, positions] = _draw_classes(self.logits.detach()[n, positions], draws)
        return self._log_probability(drawn)

    def _log_probability(self, labels: Tensor) -> Tensor:
        logits = _at_least_fp32(self.logits.flatten(0, 1))
        return -F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def exact(self) -> Iterator[Tensor]:
        """diag(p) − ppᵀ = Σ_k u_k u_kᵀ with C − 1 terms, so that G_n = Jₙᵀ u_k, k = 1 … C − 1.

        The Cholesky factor in closed form (Tanabe & Sagae 1992): with the tails q_k = Σ_{i>k} p_i,
        u_k = √(p_k q_k / q_{k−1}) (e_k − Σ_{i>k} (p_i / q_k) e_i). For two classes this is the one
        backward of (l₀ − l₁)·√(p₀p₁).
        """
        logits = _at_least_fp32(self.logits)
        probabilities = logits.detach().double().softmax(-1)
        for positions in _nth_labelled(self.labels):
            for factor in _multinomial_factors(probabilities[positions]):
                yield (logits[positions] * factor.to(logits.dtype)).sum()

    def graph_output(self) -> Tensor:
        return self.logits

    def first_example(self) -> Categorical:
        return Categorical(self.logits[:1], self.labels[:1])

    def without(self, padding: Tensor) -> Categorical:
        return replace(self, labels=self.labels.masked_fill(padding.unsqueeze(1), IGNORED))


@dataclass(frozen=True)
class Bernoulli(Distribution):
    """Independent yes/no labels: `logits` (B, D), `labels` (B, D) in [0, 1]."""

    logits: Tensor
    labels: Tensor

    @property
    def labelled(self) -> Tensor:
        return torch.ones(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)

    @property
    def num_exact_passes(self) -> int:
        return self.logits.shape[-1]

    def empirical(self) -> Tensor:
        return self._log_probability(self.labels)

    def sampled(self, uniforms: Uniforms) -> Tensor:
        draws = _stacked(uniforms, self.logits)
        return self._log_probability(draws < self.logits.detach().sigmoid())

    def _log_probability(self, labels: Tensor) -> Tensor:
        logits = _at_least_fp32(self.logits)
        return -F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")

    def exact(self) -> Iterator[Tensor]:
        """The variance of label d is p_d (1 − p_d): G_n = √(p_d (1 − p_d)) ∂l_d."""
        logits = _at_least_fp32(self.logits)
        p = logits.detach().sigmoid()
        weighted = logits * (p * (1 - p)).sqrt()
        yield from (weighted[:, d].sum() for d in range(logits.shape[-1]))

    def graph_output(self) -> Tensor:
        return self.logits

    def without(self, padding: Tensor) -> Bernoulli:
        return replace(self, logits=_without_gradient(self.logits, padding))


@dataclass(frozen=True)
class Gaussian(Distribution):
    """Regression with unit variance, log p = −½ (y − f)²: `means` f (B, D), `labels` (B, D)."""

    means: Tensor
    labels: Tensor

    @property
    def labelled(self) -> Tensor:
        return torch.ones(self.means.shape[0], dtype=torch.bool, device=self.means.device)

    @property
    def num_exact_passes(self) -> int:
        return self.means.shape[-1]

    def empirical(self) -> Tensor:
        means = _at_least_fp32(self.means)
        return -0.5 * (self.labels.to(means.dtype) - means).square().sum()

    def sampled(self, uniforms: Uniforms) -> Tensor:
        means = _at_least_fp32(self.means)
        noise = math.sqrt(2.0) * torch.erfinv(2.0 * _stacked(uniforms, means) - 1.0)
        return (means * noise.to(means.dtype)).sum()

    def exact(self) -> Iterator[Tensor]:
        """E[(y − f)²] = 1 for each output: G_n = ∂f_d."""
        means = _at_least_fp32(self.means)
        yield from (means[:, d].sum() for d in range(means.shape[-1]))

    def graph_output(self) -> Tensor:
        return self.means

    def without(self, padding: Tensor) -> Gaussian:
        return replace(self, means=_without_gradient(self.means, padding))


@dataclass(frozen=True)
class Joint(Distribution):
    """Independent outputs of one model, such as the start and the end of an answer."""

    parts: Sequence[Distribution]

    @property
    def labelled(self) -> Tensor:
        return torch.stack([part.labelled for part in self.parts]).any(0)

    @property
    def num_exact_passes(self) -> int:
        return sum(part.num_exact_passes for part in self.parts)

    def empirical(self) -> Tensor:
        return torch.stack([part.empirical() for part in self.parts]).sum()

    def sampled(self, uniforms: Uniforms) -> Tensor:
        def shifted(offset: int) -> Uniforms:
            return lambda count, example: uniforms(count + offset, example)[offset:]

        drawn = [part.sampled(shifted(i)) for i, part in enumerate(self.parts)]
        return torch.stack(drawn).sum()

    def exact(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.exact()

    def graph_output(self) -> Tensor:
        return self.parts[0].graph_output()

    def first_example(self) -> Joint:
        return Joint([part.first_example() for part in self.parts])

    def without(self, padding: Tensor) -> Joint:
        return Joint([part.without(padding) for part in self.parts])


def _without_gradient(outputs: Tensor, padding: Tensor) -> Tensor:
    """The same values, cut off the graph in the rows that are `padding`."""
    return torch.where(padding.unsqueeze(1), outputs.detach(), outputs)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stacked(uniforms: Uniforms, like: Tensor) -> Tensor:
    rows = [uniforms(like.shape[-1], n) for n in range(like.shape[0])]
    return torch.stack(rows).to(like.device)


def _draw_classes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the distribution function: (T, C) logits and (T,) uniforms → (T,) classes."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    thresholds = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, thresholds, right=True)
        .squeeze(-1)
        .clamp_(max=logits.shape[-1] - 1)
    )


def _nth_labelled(labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For i = 0, 1, …: the (example, position) indices of each example's i-th labelled position."""
    mask = labels != IGNORED
    order = mask.long().cumsum(1)
    for i in range(1, int(order.max()) + 1 if mask.any() else 0):
        examples, positions = torch.nonzero(mask & (order == i), as_tuple=True)
        yield examples, positions


def _multinomial_factors(probabilities: Tensor) -> Iterator[Tensor]:
    """The columns u_k (M, C) of the Cholesky factor of diag(p) − ppᵀ; zero columns are left out."""
    reversed_sums = probabilities.flip(-1).cumsum(-1).flip(-1)  # q_{k−1} = p_k + p_{k+1} + …
    for k in range(probabilities.shape[-1] - 1):
        p, before, after = probabilities[:, k], reversed_sums[:, k], reversed_sums[:, k + 1]
        scale = (p * after / before.clamp_min(torch.finfo(p.dtype).tiny)).sqrt()
        if not scale.any():
            continue
        column = torch.zeros_like(probabilities)
        column[:, k] = scale
        share = probabilities[:, k + 1 :] / after.clamp_min(torch.finfo(p.dtype).tiny).unsqueeze(-1)
        column[:, k + 1 :] = -scale.unsqueeze(-1) * share
        yield column
