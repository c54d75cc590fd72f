"""What one use of a parameter contributes to the per-example gradients, in factored form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_ewc.fisher.uses.squares import Pair


class Part(ABC):
    """G_n, n = 1 … B: the gradients, one per example, that one use of a tensor delivers."""

    @abstractmethod
    def add_to(self, gradient: Tensor, example: int) -> None:
        """gradient += G_example; `gradient` is shaped like the tensor that was used."""


@dataclass(frozen=True)
class DensePart(Part):
    """G_n written out: `gradients` is (B, *shape)."""

    gradients: Tensor

    def add_to(self, gradient: Tensor, example: int) -> None:
        gradient.add_(self.gradients[example].reshape(gradient.shape))


@dataclass(frozen=True)
class RowPart(Part):
    """Of a tensor (R, …) whose rows belong to examples: G_n holds example n's rows of `gradients`.

    `owners` (R,) names the example of each row.
    """

    gradients: Tensor
    owners: Tensor

    def add_to(self, gradient: Tensor, example: int) -> None:
        rows = self.owners == example
        gradient[rows] += self.gradients[rows].to(gradient.dtype)


@dataclass(frozen=True)
class LinearPart(Part):
    """G_n = gₙᵀ xₙ: `gradients` g is (B, T, O), `inputs` x is (B, T, I)."""

    gradients: Tensor
    inputs: Tensor

    @property
    def swapped(self) -> LinearPart:
        """The part of the transposed weight."""
        return LinearPart(self.inputs, self.gradients)

    def pairs(self) -> list[Pair]:
        return list(zip(self.gradients, self.inputs, strict=True))

    def add_to(self, gradient: Tensor, example: int) -> None:
        g, x = self.gradients[example], self.inputs[example]
        gradient.add_(g.T @ x)


@dataclass(frozen=True)
class RaggedPart(Part):
    """G_n = Σ_{r : owner_r = n} g_r x_rᵀ: rows that were gathered, as in a mixture of experts.

    `gradients` is (R, O), `inputs` (R, I), `owners` (R,) names the example of each row.
    """

    gradients: Tensor
    inputs: Tensor
    owners: Tensor
    num_examples: int

    @property
    def swapped(self) -> RaggedPart:
        return RaggedPart(self.inputs, self.gradients, self.owners, self.num_examples)

    @cached_property
    def _pairs(self) -> list[Pair]:
        order = torch.argsort(self.owners, stable=True)
        lengths = torch.bincount(self.owners, minlength=self.num_examples).tolist()
        return list(
            zip(
                self.gradients[order].split(lengths),
                self.inputs[order].split(lengths),
                strict=True,
            )
        )

    def pairs(self) -> list[Pair]:
        return self._pairs

    def add_to(self, gradient: Tensor, example: int) -> None:
        g, x = self._pairs[example]
        gradient.add_(g.T @ x)


@dataclass(frozen=True)
class LookupPart(Part):
    """G_n[v] = Σ_t [index_nt = v] g_nt: `indices` (B, T), `gradients` (B, T, D)."""

    indices: Tensor
    gradients: Tensor

    def sorted_rows(self) -> list[Pair]:
        indices, order = self.indices.sort(dim=1)
        return [(i, g[o]) for i, g, o in zip(indices, self.gradients, order, strict=True)]

    def add_to(self, gradient: Tensor, example: int) -> None:
        gradient.index_add_(0, self.indices[example], self.gradients[example].to(gradient.dtype))


@dataclass(frozen=True)
class RowLookupPart(Part):
    """As `LookupPart`, for rows in any order: `indices` (R,), `gradients` (R, D), `owners` (R,)."""

    indices: Tensor
    gradients: Tensor
    owners: Tensor

    def add_to(self, gradient: Tensor, example: int) -> None:
        rows = self.owners == example
        gradient.index_add_(0, self.indices[rows], self.gradients[rows].to(gradient.dtype))
