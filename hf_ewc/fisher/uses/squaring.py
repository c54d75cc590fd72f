"""From what the uses of a parameter delivered to the sum of squares per example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from hf_ewc.fisher.uses import squares
from hf_ewc.fisher.uses.gradients import Dense, Linear, Lookup, PerExampleGradient
from hf_ewc.fisher.uses.product import Product
from hf_ewc.fisher.uses.square_sum import Geometry, SquareSum, Use

# Per-example gradients of a derived tensor are pulled back in one batched call up to this size.
_BATCHED_PULLBACK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class _Placed(PerExampleGradient):
    """The gradient of a part of a parameter, as one of the whole."""

    gradient: PerExampleGradient
    geometry: Geometry

    def add_to(self, gradient: Tensor, example: int) -> None:
        size, stride, offset = self.geometry
        placed = gradient.as_strided(size, stride, gradient.storage_offset() + offset)
        self.gradient.add_to(placed, example)


def gradients_of(group: list[SquareSum], example: int) -> list[tuple[str, Tensor | Product]]:
    """G_example of each parameter of a group, of what was delivered; none if nothing was.

    As products, several for a parameter that has several uses, where it was delivered so.
    """
    if len(group) == 1 and (products := _products_of(group[0], example)) is not None:
        return [(group[0].name, product) for product in products]
    uses = _delivered_once(use for one in group for use in one.derived)
    if not uses and not any(use.gradient for one in group for use, _ in one.direct):
        return []
    cotangents = [_written_out(use, example) for use in uses]
    pulled_back = _pull_back(group, uses, cotangents, batched=False)
    found: list[tuple[str, Tensor | Product]] = []
    for one, gradient in zip(group, pulled_back, strict=True):
        summed = one.zeros()
        if gradient is not None:
            summed += gradient
        _add_direct(one, summed, example)
        found.append((one.name, summed))
    return found


def _products_of(one: SquareSum, example: int) -> list[Product] | None:
    """What the uses of a matrix, as it is or transposed, add up to; None if not of products."""
    delivered = [(use.gradient, place) for use, place in one.direct if use.gradient is not None]
    if one.derived or not delivered or one.parameter.dim() != 2:
        return None
    found = [_product_of(gradient, place, one.parameter, example) for gradient, place in delivered]
    known = [product for product in found if product is not None]
    return known if len(known) == len(found) else None


def _product_of(
    gradient: PerExampleGradient, place: Geometry, parameter: Tensor, example: int
) -> Product | None:
    height, width = parameter.shape
    if place == ((height, width), parameter.stride(), 0):
        if isinstance(gradient, Lookup):
            own = gradient.owners == example
            return Product(gradient.indices[own], gradient.gradients[own], height)
        if isinstance(gradient, Linear):
            return Product(gradient.gradients[example], gradient.inputs[example], height)
    if place == ((width, height), parameter.stride()[::-1], 0) and isinstance(gradient, Linear):
        return Product(gradient.inputs[example], gradient.gradients[example], height)
    return None


def square(one: SquareSum, num_examples: int) -> None:
    """Add the squares of the delivered direct uses, summing uses that overlap first."""
    delivered = [(use.gradient, geometry) for use, geometry in one.direct if use.gradient]
    for use, _ in one.direct:
        use.gradient = None
    for cluster in _overlapping(delivered):
        total = one.sum_of_squares()
        gradients = [gradient for gradient, _ in cluster]
        geometries = {geometry for _, geometry in cluster}
        if len(geometries) == 1:
            total = total.as_strided(*geometries.pop())
        else:
            gradients = [_Placed(*placed) for placed in cluster]
        reduce(lambda a, b: a.plus(b), gradients).add_squares_to(total, num_examples)


def _overlapping(
    delivered: list[tuple[PerExampleGradient, Geometry]],
) -> list[list[tuple[PerExampleGradient, Geometry]]]:
    """Group uses whose elements may coincide: equal extents in memory or crossing ones."""
    clusters: list[list[tuple[PerExampleGradient, Geometry]]] = []
    end = -1
    for gradient, geometry in sorted(delivered, key=lambda item: item[1][2]):
        size, stride, start = geometry
        if start > end or not clusters:
            clusters.append([])
        clusters[-1].append((gradient, geometry))
        last = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        end = max(end, last)
    return clusters


def square_derived(group: list[SquareSum], num_examples: int) -> None:
    """Pull the gradients of derived tensors back to the parameters, then square.

    For W' = h(W): G_n = J_hᵀ G'_n, plus what the direct uses of W add. One batched call where the
    per-example gradients are small, example by example otherwise.
    """
    uses = _delivered_once(use for one in group for use in one.derived)
    direct = [use for one in group for use, _ in one.direct if use.gradient is not None]
    elements = sum(use.tensor.numel() for use in uses)
    elements += sum(one.parameter.numel() for one in group)
    small = num_examples * elements <= _BATCHED_PULLBACK_ELEMENTS
    if uses and small and all(isinstance(use.gradient, Dense) for use in [*uses, *direct]):
        _square_derived_at_once(group, uses)
    else:
        for example in range(num_examples):
            cotangents = [_written_out(use, example) for use in uses]
            gradients = _pull_back(group, uses, cotangents, batched=False)
            for one, gradient in zip(group, gradients, strict=True):
                _add_with_direct(one, gradient, example)
    for use in [*uses, *direct]:
        use.gradient = None


def _delivered_once(uses: Iterable[Use]) -> list[Use]:
    return list({id(use): use for use in uses if use.gradient is not None}.values())


def _written_out(use: Use, example: int) -> Tensor:
    cotangent = torch.zeros_like(use.tensor, requires_grad=False)
    if use.gradient is not None:
        use.gradient.add_to(cotangent, example)
    return cotangent


def _pull_back(
    group: list[SquareSum], uses: list[Use], cotangents: list[Tensor], *, batched: bool
) -> list[Tensor | None]:
    if not uses:
        return [None] * len(group)
    return list(
        torch.autograd.grad(
            [use.tensor for use in uses],
            [one.parameter for one in group],
            cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    )


def _square_derived_at_once(group: list[SquareSum], uses: list[Use]) -> None:
    cotangents = []
    for use in uses:
        if isinstance(use.gradient, Dense):
            shaped = use.gradient.gradients.reshape(-1, *use.tensor.shape)
            cotangents.append(shaped.to(use.tensor.dtype))
    gradients = _pull_back(group, uses, cotangents, batched=True)
    for one, gradient in zip(group, gradients, strict=True):
        total = one.sum_of_squares()
        summed = total.new_zeros(cotangents[0].shape[0], *total.shape)
        if gradient is not None:
            summed += gradient
        for example, row in enumerate(summed):
            _add_direct(one, row, example)
        squares.add_dense(total, summed)


def _add_with_direct(one: SquareSum, gradient: Tensor | None, example: int) -> None:
    total = one.sum_of_squares()
    summed = torch.zeros_like(total)
    if gradient is not None:
        summed += gradient
    _add_direct(one, summed, example)
    total.addcmul_(summed, summed)


def _add_direct(one: SquareSum, gradient: Tensor, example: int) -> None:
    for use, geometry in one.direct:
        if use.gradient is not None:
            _Placed(use.gradient, geometry).add_to(gradient, example)
