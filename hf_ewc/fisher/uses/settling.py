"""From what the uses of a parameter delivered to the sum of squares per example."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_ewc.fisher.uses import squares
from hf_ewc.fisher.uses.account import Account, Geometry, Site
from hf_ewc.fisher.uses.parts import DensePart, LinearPart, LookupPart, Part, RaggedPart

# Per-example gradients of a derived tensor are pulled back in one batched call up to this size.
_BATCHED_PULLBACK_ELEMENTS = 1 << 22


def settle(account: Account, num_examples: int) -> None:
    """Add the squares of the delivered direct uses, summing uses that overlap first."""
    delivered = [(site.part, geometry) for site, geometry in account.direct if site.part]
    for site, _ in account.direct:
        site.part = None
    for cluster in _overlapping(delivered):
        geometries = {geometry for _, geometry in cluster}
        parts = [part for part, _ in cluster]
        total = account.sum_of_squares()
        if len(geometries) == 1 and _settle_alike(total.as_strided(*geometries.pop()), parts):
            continue
        for example in range(num_examples):
            gradient = torch.zeros_like(total)
            for part, geometry in cluster:
                part.add_to(gradient.as_strided(*geometry), example)
            total.addcmul_(gradient, gradient)


def _overlapping(
    delivered: list[tuple[Part, Geometry]],
) -> list[list[tuple[Part, Geometry]]]:
    """Group uses whose elements may coincide: equal extents in memory or crossing ones."""
    clusters: list[list[tuple[Part, Geometry]]] = []
    end = -1
    for part, geometry in sorted(delivered, key=lambda item: item[1][2]):
        size, stride, start = geometry
        if start > end or not clusters:
            clusters.append([])
        clusters[-1].append((part, geometry))
        last = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        end = max(end, last)
    return clusters


def _settle_alike(total: Tensor, parts: list[Part]) -> bool:
    """Settle uses of one and the same elements; False where only the general way is right."""
    dense = [part for part in parts if isinstance(part, DensePart)]
    linear = [part for part in parts if isinstance(part, LinearPart)]
    ragged = [part for part in parts if isinstance(part, RaggedPart)]
    lookups = [part for part in parts if isinstance(part, LookupPart)]
    if len(dense) == len(parts):
        gradients = dense[0].gradients
        for other in dense[1:]:
            gradients = gradients + other.gradients
        squares.add_dense(total, gradients.reshape(-1, *total.shape))
        return True
    if len(lookups) == len(parts):
        merged = _merged_lookups(lookups)
        squares.add_lookups(total, merged.indices, merged.gradients)
        return True
    if len(linear) + len(ragged) + len(lookups) < len(parts):
        return False
    if total.stride(0) == 1 and total.stride(1) != 1 and not lookups:
        total = total.T
        linear = [part.swapped for part in linear]
        ragged = [part.swapped for part in ragged]
    rows = _merged_lookups(lookups).sorted_rows() if lookups else None
    if len(linear) == 1 and not ragged and rows is None:
        squares.add_linear(total, linear[0].gradients, linear[0].inputs)
        return True
    squares.add_linear_pairs(total, _merged_pairs([*linear, *ragged]), rows)
    return True


def _merged_lookups(parts: list[LookupPart]) -> LookupPart:
    if len(parts) == 1:
        return parts[0]
    return LookupPart(
        torch.cat([part.indices for part in parts], dim=1),
        torch.cat([part.gradients for part in parts], dim=1),
    )


def _merged_pairs(parts: list[LinearPart | RaggedPart]) -> list[squares.Pair]:
    if len(parts) == 1:
        return parts[0].pairs()
    per_example = zip(*(part.pairs() for part in parts), strict=True)
    return [
        (torch.cat([g for g, _ in pairs]), torch.cat([x for _, x in pairs]))
        for pairs in per_example
    ]


def settle_derived(group: list[Account], num_examples: int) -> None:
    """Pull the gradients of derived tensors back to the parameters, then square.

    For W' = h(W): G_n = J_hᵀ G'_n, plus what the direct uses of W add. One batched call where the
    per-example gradients are small, example by example otherwise.
    """
    sites = _delivered_once(site for account in group for site in account.derived)
    direct = [site for account in group for site, _ in account.direct if site.part is not None]
    elements = sum(site.tensor.numel() for site in sites)
    elements += sum(account.parameter.numel() for account in group)
    small = num_examples * elements <= _BATCHED_PULLBACK_ELEMENTS
    if sites and small and all(isinstance(site.part, DensePart) for site in [*sites, *direct]):
        _settle_derived_at_once(group, sites)
    else:
        for example in range(num_examples):
            cotangents = [_written_out(site, example) for site in sites]
            gradients = _pull_back(group, sites, cotangents, batched=False)
            for account, gradient in zip(group, gradients, strict=True):
                _add_with_direct(account, gradient, example)
    for site in [*sites, *direct]:
        site.part = None


def _delivered_once(sites: Iterable[Site]) -> list[Site]:
    return list({id(site): site for site in sites if site.part is not None}.values())


def _written_out(site: Site, example: int) -> Tensor:
    cotangent = torch.zeros_like(site.tensor, requires_grad=False)
    if site.part is not None:
        site.part.add_to(cotangent, example)
    return cotangent


def _pull_back(
    group: list[Account], sites: list[Site], cotangents: list[Tensor], *, batched: bool
) -> list[Tensor | None]:
    if not sites:
        return [None] * len(group)
    return list(
        torch.autograd.grad(
            [site.tensor for site in sites],
            [account.parameter for account in group],
            cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    )


def _settle_derived_at_once(group: list[Account], sites: list[Site]) -> None:
    cotangents = []
    for site in sites:
        if isinstance(site.part, DensePart):
            shaped = site.part.gradients.reshape(-1, *site.tensor.shape)
            cotangents.append(shaped.to(site.tensor.dtype))
    gradients = _pull_back(group, sites, cotangents, batched=True)
    for account, gradient in zip(group, gradients, strict=True):
        total = account.sum_of_squares()
        summed = total.new_zeros(cotangents[0].shape[0], *total.shape)
        if gradient is not None:
            summed += gradient
        for site, geometry in account.direct:
            if site.part is not None:
                for example, row in enumerate(summed):
                    size, stride, offset = geometry
                    site.part.add_to(
                        row.as_strided(size, stride, row.storage_offset() + offset), example
                    )
        squares.add_dense(total, summed)


def _add_with_direct(account: Account, gradient: Tensor | None, example: int) -> None:
    total = account.sum_of_squares()
    summed = torch.zeros_like(total)
    if gradient is not None:
        summed += gradient
    for site, geometry in account.direct:
        if site.part is not None:
            site.part.add_to(summed.as_strided(*geometry), example)
    total.addcmul_(summed, summed)
