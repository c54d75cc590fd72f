"""The ledger: which uses of which parameters the forward made, and what each one delivered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_ewc.fisher import squares
from hf_ewc.fisher.parts import DensePart, LinearPart, LookupPart, Part, RaggedPart

# Per-example gradients of a derived tensor are pulled back in one batched call up to this size.
_BATCHED_PULLBACK_ELEMENTS = 1 << 22

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset into the parameter


class Site:
    """One use of a tensor: opened in the forward, delivered once a pass in the backward."""

    def __init__(self, ledger: Ledger, tensor: Tensor, accounts: list[Account]) -> None:
        self.tensor = tensor
        self.accounts = accounts
        self.part: Part | None = None
        self._ledger = ledger

    def deliver(self, part: Part) -> None:
        self.part = part
        self._ledger._delivered(self)


@dataclass(eq=False)
class Account:
    """The uses of one parameter, and the sum of squares they add up to."""

    name: str
    parameter: Tensor
    total: Tensor | None = None
    direct: list[tuple[Site, Geometry]] = field(default_factory=list)
    derived: list[Site] = field(default_factory=list)
    outstanding: int = 0

    def sum_of_squares(self) -> Tensor:
        """The accumulator, strided like the parameter, fp32 (fp64 for an fp64 parameter)."""
        if self.total is None:
            dtype = torch.promote_types(self.parameter.dtype, torch.float32)
            self.total = _zeros_strided_like(self.parameter, dtype)
        return self.total


class Ledger:
    """Adds Σ_n (Σ_uses G_n)² to every parameter's account: the uses summed before squaring.

    The forward opens a site for each use, the backward delivers a `Part` to it. When the last
    outstanding site of a parameter has delivered, the parameter is settled and its parts freed;
    what never delivers lies off the graph of the objective and has gradient zero.

    Args:
        parameters: the selected parameters by name.
        num_examples: B, the examples in the batch.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._accounts = {id(p): Account(name, p) for name, p in parameters.items()}
        self.num_examples = 0

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self._accounts

    def name_of(self, tensor: Tensor) -> str:
        return self._accounts[id(tensor)].name

    def totals(self) -> dict[str, Tensor]:
        """Σ over all examples so far of the squared gradients, by name."""
        return {account.name: account.sum_of_squares() for account in self._accounts.values()}

    def start(self, num_examples: int) -> None:
        """Begin a batch: no uses yet."""
        self.num_examples = num_examples
        for account in self._accounts.values():
            account.direct.clear()
            account.derived.clear()

    def open(self, tensor: Tensor) -> Site:
        """A site for one use of `tensor`: a parameter, a view of one, or derived from some."""
        geometry = self._geometry(tensor)
        if geometry is not None:
            account = self._accounts[id(_base(tensor))]
            site = Site(self, tensor, [account])
            account.direct.append((site, geometry))
            return site
        accounts = [self._accounts[id(leaf)] for leaf in leaves(tensor) if self.holds(leaf)]
        site = Site(self, tensor, accounts)
        for account in accounts:
            account.derived.append(site)
        return site

    def is_direct(self, tensor: Tensor) -> bool:
        """Whether each element of `tensor` is one element of a parameter."""
        return self._geometry(tensor) is not None

    def _geometry(self, tensor: Tensor) -> Geometry | None:
        base = _base(tensor)
        if not self.holds(base) or tensor.dtype != base.dtype or repeats(tensor):
            return None
        offset = int(tensor.storage_offset()) - int(base.storage_offset())
        return tuple(tensor.size()), tuple(tensor.stride()), offset

    def start_pass(self) -> None:
        """Before each backward over the graph."""
        for account in self._accounts.values():
            account.outstanding = len(account.direct)
            for site in self._sites(account):
                site.part = None

    @torch.no_grad()
    def finish_pass(self) -> None:
        """After each backward: settle what is still open, derived tensors among it."""
        settled: set[int] = set()
        for account in self._accounts.values():
            if id(account) in settled:
                continue
            group = self._connected(account)
            settled.update(id(member) for member in group)
            if any(member.derived for member in group):
                _settle_derived(group, self.num_examples)
            else:
                _settle(account, self.num_examples)

    def _sites(self, account: Account) -> list[Site]:
        return [site for site, _ in account.direct] + account.derived

    def _delivered(self, site: Site) -> None:
        if len(site.accounts) != 1:
            return
        account = site.accounts[0]
        if account.derived or not account.direct:
            return
        account.outstanding -= 1
        if account.outstanding == 0:
            _settle(account, self.num_examples)

    def _connected(self, account: Account) -> list[Account]:
        """The accounts that share derived tensors with `account`, itself included."""
        group, queue = [account], [account]
        while queue:
            for site in queue.pop().derived:
                for other in site.accounts:
                    if not any(other is member for member in group):
                        group.append(other)
                        queue.append(other)
        return group


def _zeros_strided_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros whose elements lie as those of `tensor`, with gaps where it has gaps."""
    size, stride = tensor.size(), tensor.stride()
    if tensor.numel() == 0:
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
    extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return torch.zeros(extent, dtype=dtype, device=tensor.device).as_strided(size, stride)


def leaves(tensor: Tensor) -> list[Tensor]:
    """The leaf tensors that the autograd graph of `tensor` reaches."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    return [leaf for leaf, _ in leaf_uses(tensor)]


def leaf_uses(tensor: Tensor) -> list[tuple[Tensor, str]]:
    """Each leaf that the graph of `tensor` reaches, with the operation that uses it."""
    found: dict[int, tuple[Tensor, str]] = {}
    seen = {tensor.grad_fn}
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                found.setdefault(id(leaf), (leaf, node.name()))
            else:
                seen.add(following)
                stack.append(following)
    return list(found.values())


def repeats(tensor: Tensor) -> bool:
    """Whether several elements of `tensor` are one element in memory, as after `expand`."""
    return any(
        stride == 0 and size > 1
        for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
    )


def _base(tensor: Tensor) -> Tensor:
    base = tensor._base
    return tensor if base is None else base


def _settle(account: Account, num_examples: int) -> None:
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


def _settle_derived(group: list[Account], num_examples: int) -> None:
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
