"""The ledger: which uses of which parameters the forward made, and what each one delivered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_ewc.fisher.uses.account import Account, Geometry, Site, repeats
from hf_ewc.fisher.uses.graph import leaves
from hf_ewc.fisher.uses.settling import settle, settle_derived


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
            site = Site(tensor, [account], self._delivered)
            account.direct.append((site, geometry))
            return site
        accounts = [self._accounts[id(leaf)] for leaf in leaves(tensor) if self.holds(leaf)]
        site = Site(tensor, accounts, self._delivered)
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
                settle_derived(group, self.num_examples)
            else:
                settle(account, self.num_examples)

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
            settle(account, self.num_examples)

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


def _base(tensor: Tensor) -> Tensor:
    base = tensor._base
    return tensor if base is None else base
