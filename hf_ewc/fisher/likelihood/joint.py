"""Several independent outputs of one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ewc.fisher.likelihood.choices import Choices
from hf_ewc.fisher.likelihood.distribution import Distribution


@dataclass(frozen=True)
class Joint(Distribution):
    """Independent outputs of one model, such as the start and the end of an answer."""

    factors: Sequence[Distribution]

    @property
    def labelled(self) -> Tensor:
        return torch.stack([factor.labelled for factor in self.factors]).any(0)

    @property
    def num_labels(self) -> int:
        return sum(factor.num_labels for factor in self.factors)

    @property
    def num_positions(self) -> int:
        return sum(factor.num_positions for factor in self.factors)

    @property
    def num_exact_passes(self) -> int:
        return sum(factor.num_exact_passes for factor in self.factors)

    def empirical(self) -> Tensor:
        return torch.stack([factor.empirical() for factor in self.factors]).sum()

    def sampled(self, choices: Choices) -> Tensor:
        drawn = [f.sampled(choices.of_factor(i)) for i, f in enumerate(self.factors)]
        return torch.stack(drawn).sum()

    def exact(self, choices: Choices) -> Iterator[Tensor]:
        for i, factor in enumerate(self.factors):
            yield from factor.exact(choices.of_factor(i))

    def losses(self) -> list[Tensor]:
        """Also the mean over the outputs of each one's own mean."""
        means = [factor.losses()[0] for factor in self.factors]
        return [*super().losses(), torch.stack(means).mean()]

    def graph_output(self) -> Tensor:
        return self.factors[0].graph_output()

    def first_example(self) -> Joint:
        return Joint([factor.first_example() for factor in self.factors])

    def without(self, padding: Tensor) -> Joint:
        return Joint([factor.without(padding) for factor in self.factors])
