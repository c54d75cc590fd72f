"""What one use of a parameter contributes to the per-example gradients, in factored form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_ewc.fisher.uses import squares
from hf_ewc.fisher.uses.squares import Pair


class PerExampleGradient(ABC):
    """G_n, n = 1 … B: the gradients, one per example, that one use of a tensor delivers."""

    @abstractmethod
    def add_to(self, gradient: Tensor, example: int) -> None:
        """gradient += G_example; `gradient` is shaped like the tensor that was used."""

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        """total += Σ_n G_n², in the dtype of `total`; here example by example, written out."""
        for example in range(num_examples):
            gradient = torch.zeros_like(total)
            self.add_to(gradient, example)
            total.addcmul_(gradient, gradient)

    def plus(self, other: PerExampleGradient) -> PerExampleGradient:
        """The sum of two uses of the same elements, in the best form that both have."""
        mine, others = self.as_products(), other.as_products()
        if mine is None or others is None:
            return Sum(self, other)
        return mine.joined(others)

    def as_products(self) -> Products | None:
        """As a sum of products and look-ups, where it is one."""
        return None


@dataclass(frozen=True)
class Sum(PerExampleGradient):
    """The sum of two uses that have no common form."""

    first: PerExampleGradient
    second: PerExampleGradient

    def add_to(self, gradient: Tensor, example: int) -> None:
        self.first.add_to(gradient, example)
        self.second.add_to(gradient, example)


@dataclass(frozen=True)
class Dense(PerExampleGradient):
    """G_n written out: `gradients` is (B, *shape)."""

    gradients: Tensor

    def add_to(self, gradient: Tensor, example: int) -> None:
        gradient.add_(self.gradients[example].reshape(gradient.shape))

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        squares.add_dense(total, self.gradients.reshape(-1, *total.shape))

    def plus(self, other: PerExampleGradient) -> PerExampleGradient:
        if isinstance(other, Dense):
            return Dense(self.gradients + other.gradients)
        return super().plus(other)


@dataclass(frozen=True)
class Rows(PerExampleGradient):
    """Of a tensor (R, …) whose rows belong to examples: G_n holds example n's rows of `gradients`.

    `owners` (R,) names the example of each row.
    """

    gradients: Tensor
    owners: Tensor

    def add_to(self, gradient: Tensor, example: int) -> None:
        rows = self.owners == example
        gradient[rows] += self.gradients[rows].to(gradient.dtype)

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        gradients = self.gradients.to(total.dtype)
        total.addcmul_(gradients, gradients)  # no row has two owners


@dataclass(frozen=True)
class Linear(PerExampleGradient):
    """G_n = gₙᵀ xₙ: `gradients` g is (B, T, O), `inputs` x is (B, T, I)."""

    gradients: Tensor
    inputs: Tensor

    @property
    def transposed(self) -> Linear:
        """Of the transposed weight."""
        return Linear(self.inputs, self.gradients)

    def pairs(self) -> list[Pair]:
        return list(zip(self.gradients, self.inputs, strict=True))

    def add_to(self, gradient: Tensor, example: int) -> None:
        g, x = self.gradients[example], self.inputs[example]
        _add_product(gradient, g, x)

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        if _lies_transposed(total):
            squares.add_linear(total.T, self.inputs, self.gradients)
        else:
            squares.add_linear(total, self.gradients, self.inputs)

    def as_products(self) -> Products:
        return Products((self,))


@dataclass(frozen=True)
class RaggedLinear(PerExampleGradient):
    """G_n = Σ_{r : owner_r = n} g_r x_rᵀ: rows that were gathered, as in a mixture of experts.

    `gradients` is (R, O), `inputs` (R, I), `owners` (R,) names the example of each row.
    """

    gradients: Tensor
    inputs: Tensor
    owners: Tensor
    num_examples: int

    @property
    def transposed(self) -> RaggedLinear:
        return RaggedLinear(self.inputs, self.gradients, self.owners, self.num_examples)

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
        _add_product(gradient, g, x)

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        self.as_products().add_squares_to(total, num_examples)

    def as_products(self) -> Products:
        return Products((self,))


@dataclass(frozen=True)
class Lookup(PerExampleGradient):
    """G_n[v] = Σ_{t : owner_t = n} [index_t = v] g_t, the gradient of an embedding.

    `indices` (R,), `gradients` (R, D), and `owners` (R,), which names the example of each.
    """

    indices: Tensor
    gradients: Tensor
    owners: Tensor

    def rows(self, num_examples: int) -> list[Pair]:
        """(indices, gradients) of each example, the indices in order."""
        order = self.indices.argsort(stable=True)
        order = order[self.owners[order].argsort(stable=True)]
        lengths = torch.bincount(self.owners, minlength=num_examples).tolist()
        indices, gradients = self.indices[order], self.gradients[order]
        return list(zip(indices.split(lengths), gradients.split(lengths), strict=True))

    def add_to(self, gradient: Tensor, example: int) -> None:
        own = self.owners == example
        gradient.index_add_(0, self.indices[own], self.gradients[own].to(gradient.dtype))

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        squares.add_lookups(total, self.indices, self.gradients, self.owners)

    def plus(self, other: PerExampleGradient) -> PerExampleGradient:
        return self.joined(other) if isinstance(other, Lookup) else super().plus(other)

    def joined(self, other: Lookup) -> Lookup:
        return Lookup(
            torch.cat([self.indices, other.indices]),
            torch.cat([self.gradients, other.gradients]),
            torch.cat([self.owners, other.owners]),
        )

    def as_products(self) -> Products:
        return Products((), self)


@dataclass(frozen=True)
class Products(PerExampleGradient):
    """G_n = Σ over uses of gₙᵀ xₙ, and look-ups: a weight that is used often, or tied."""

    uses: tuple[Linear | RaggedLinear, ...]
    lookup: Lookup | None = None

    def joined(self, other: Products) -> Products:
        lookup = self.lookup or other.lookup
        if self.lookup is not None and other.lookup is not None:
            lookup = self.lookup.joined(other.lookup)
        return Products(self.uses + other.uses, lookup)

    def add_to(self, gradient: Tensor, example: int) -> None:
        for use in (*self.uses, self.lookup):
            if use is not None:
                use.add_to(gradient, example)

    def add_squares_to(self, total: Tensor, num_examples: int) -> None:
        uses = self.uses
        if self.lookup is None and _lies_transposed(total):
            total, uses = total.T, tuple(use.transposed for use in uses)
        rows = None if self.lookup is None else self.lookup.rows(num_examples)
        squares.add_linear_pairs(total, _joined_pairs(uses), rows)

    def as_products(self) -> Products:
        return self


def _joined_pairs(uses: tuple[Linear | RaggedLinear, ...]) -> list[Pair]:
    if len(uses) == 1:
        return uses[0].pairs()
    per_example = zip(*(use.pairs() for use in uses), strict=True)
    return [
        (torch.cat([g for g, _ in pairs]), torch.cat([x for _, x in pairs]))
        for pairs in per_example
    ]


def _lies_transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def _add_product(gradient: Tensor, g: Tensor, x: Tensor) -> None:
    """gradient += gᵀ x, with nothing in between where the types are one."""
    if gradient.dtype == g.dtype == x.dtype:
        gradient.addmm_(g.T, x)
    else:
        gradient.add_(g.T @ x)
