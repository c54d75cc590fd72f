"""A class at each position: the softmax of a classifier, a tagger or a language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED
from hf_ewc.fisher.likelihood.choices import Choices
from hf_ewc.fisher.likelihood.distribution import Distribution, at_least_fp32
from hf_ewc.fisher.likelihood.slices import log_likelihood, rows_in_slice, slices
from hf_ewc.precision import uniforms_on, widened


@dataclass(frozen=True)
class Categorical(Distribution):
    """A class at each position: `logits` (B, T, C), `labels` (B, T), −100 where unlabelled."""

    logits: Tensor
    labels: Tensor

    @property
    def labelled(self) -> Tensor:
        return self._there.any(1)

    @property
    def num_labels(self) -> int:
        return int(self._there.sum())

    @property
    def num_positions(self) -> int:
        return self.labels.numel()

    @property
    def _there(self) -> Tensor:
        return self.labels != IGNORED

    @property
    def num_exact_passes(self) -> int:
        """Σ over positions of the classes with a probability above 0, less one."""
        further = torch.empty_like(self.labels)
        for logits, numbers in slices(self.logits.detach(), further):
            numbers.copy_((_probabilities(logits) > 0).sum(-1) - 1)
        # Without labels nothing says how many there will be: as many as there are positions.
        counted = further * self._there if self.num_labels else further
        return int(counted.sum(1).max()) if counted.numel() else 0

    def empirical(self) -> Tensor:
        return self._log_probability(self.labels)

    def sampled(self, choices: Choices) -> Tensor:
        drawn = self.labels.clone()
        for n, positions in enumerate(self._there):
            rows = positions.nonzero().flatten()
            draws = uniforms_on(self.logits.device, choices.uniforms(len(rows), n))
            drawn[n, rows] = choices.settled(n, draw_classes(self.logits[n].detach(), draws, rows))
        return self._log_probability(drawn)

    def _log_probability(self, labels: Tensor) -> Tensor:
        return log_likelihood(self.logits, labels)

    def exact(self, choices: Choices) -> Iterator[Tensor]:
        """diag(p) − ppᵀ = Σ_k u_k u_kᵀ with C − 1 terms, so that G_n = Jₙᵀ u_k, k = 1 … C − 1.

        C is the largest number of classes with a probability above 0 at any position.
        """
        logits = at_least_fp32(self.logits)
        probabilities = _probabilities(logits)
        for i, positions in enumerate(_nth_labelled(self._there)):
            own, p = logits[positions], probabilities[positions]
            falling = p.argsort(-1, descending=True)
            examples = positions[0].tolist()
            order = [choices.settled(n, row, i) for n, row in zip(examples, falling, strict=True)]
            for factor in _multinomial_factors(p, torch.stack(order)):
                yield (own.masked_fill(factor == 0, 0.0) * factor.to(own.dtype)).sum()

    def graph_output(self) -> Tensor:
        return self.logits

    def first_example(self) -> Categorical:
        return replace(self, logits=self.logits[:1], labels=self.labels[:1])

    def without(self, padding: Tensor) -> Categorical:
        return replace(self, labels=self.labels.masked_fill(padding.unsqueeze(1), IGNORED))


@dataclass(frozen=True)
class SoftCategorical(Categorical):
    """A class at each position, the true one given as probabilities y: log p = Σ_c y_c log p_c.

    So it is with mixed examples and with labels of several annotators. What is drawn, and the
    expectation, are over single classes as ever.

    Args:
        targets: y (B, T, C); `labels` (B, T) is −100 where they are missing.
    """

    targets: Tensor

    def empirical(self) -> Tensor:
        log_p = at_least_fp32(self.logits).log_softmax(-1)
        targets = self.targets.to(log_p.dtype).masked_fill(~self._there.unsqueeze(-1), 0.0)
        return (log_p.masked_fill(targets == 0, 0.0) * targets).sum()

    def first_example(self) -> SoftCategorical:
        first = super().first_example()
        return replace(self, logits=first.logits, labels=first.labels, targets=self.targets[:1])


def _probabilities(logits: Tensor) -> Tensor:
    return widened(logits.detach()).softmax(-1)


def draw_classes(logits: Tensor, uniforms: Tensor, rows: Tensor | None = None) -> Tensor:
    """Invert the distribution function: (T, C) logits and (T,) uniforms → (T,) classes.

    Args:
        rows: the positions that are drawn at, one for each uniform; None: all.
    """
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    count = rows_in_slice(logits.shape[-1])
    parts = zip(rows.split(count), uniforms.split(count), strict=True)
    return torch.cat([_draw(logits[some], numbers) for some, numbers in parts])


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    cumulative = _probabilities(logits).cumsum(-1)
    thresholds = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, thresholds, right=True)
    return found.squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _nth_labelled(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For i = 0, 1, …: the (example, position) indices of each example's i-th labelled position."""
    order = mask.long().cumsum(1)
    for i in range(1, int(order.max()) + 1 if mask.any() else 0):
        examples, positions = torch.nonzero(mask & (order == i), as_tuple=True)
        yield examples, positions


def _multinomial_factors(probabilities: Tensor, order: Tensor) -> Iterator[Tensor]:
    """The columns u_k (M, C) of the Cholesky factor of diag(p) − ppᵀ, as many as are not zero.

    In closed form (Tanabe & Sagae 1992): with the tails q_k = Σ_{i>k} p_i,
    u_k = √(p_k q_k / q_{k−1}) (e_k − Σ_{i>k} (p_i / q_k) e_i). For two classes this is the one
    backward of (l₀ − l₁)·√(p₀p₁). Classes are taken in each row's own `order` (M, C), by falling
    probability, so that those of probability 0 come last and end the sum.
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    falling = probabilities.gather(-1, order)
    tails = falling.flip(-1).cumsum(-1).flip(-1)  # q_{k−1} = p_k + p_{k+1} + …
    for k in range(int((falling > 0).sum(-1).max()) - 1):
        p, before, after = falling[:, k], tails[:, k], tails[:, k + 1]
        scale = (p * after / before.clamp_min(tiny)).sqrt()
        column = torch.zeros_like(falling)
        column[:, k] = scale
        share = falling[:, k + 1 :] / after.clamp_min(tiny).unsqueeze(-1)
        column[:, k + 1 :] = -scale.unsqueeze(-1) * share
        yield torch.zeros_like(column).scatter(-1, order, column)
