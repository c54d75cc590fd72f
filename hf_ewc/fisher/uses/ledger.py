"""The ledger: which uses of which parameters the forward made, and what each one delivered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_ewc.fisher.uses.graph import leaves
from hf_ewc.fisher.uses.product import Product
from hf_ewc.fisher.uses.square_sum import Geometry, SquareSum, Use, repeats
from hf_ewc.fisher.uses.squaring import gradients_of, square, square_derived


class Ledger:
    """Adds Σ_n (Σ_uses G_n)² to every parameter's sum: its uses are summed before squaring.

    The forward opens each use, the backward delivers its `PerExampleGradient`. When the last
    outstanding use of a parameter has delivered, they are squared and freed; a use that never
    delivers lies off the graph of the objective and has gradient zero.

    Args:
        parameters: the selected parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._by_tensor = {id(p): SquareSum(name, p) for name, p in parameters.items()}
        self.num_examples = 0
        self._watched: tuple[int, Callable[[str, Tensor | Product], None]] | None = None

    def watch(self, example: int, see: Callable[[str, Tensor | Product], None]) -> None:
        """Show the gradients of one example of the next batch, by parameter, as they come."""
        self._watched = example, see

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self._by_tensor

    def name_of(self, tensor: Tensor) -> str:
        return self._by_tensor[id(tensor)].name

    def totals(self) -> dict[str, Tensor]:
        """Σ over all examples so far of the squared gradients, by name."""
        return {one.name: one.sum_of_squares() for one in self._by_tensor.values()}

    def start(self, num_examples: int) -> None:
        """Begin a batch: no uses yet."""
        self.num_examples = num_examples
        for one in self._by_tensor.values():
            one.direct.clear()
            one.derived.clear()

    def finish(self) -> None:
        """End a batch."""
        self._watched = None

    def open(self, tensor: Tensor) -> Use:
        """One use of `tensor`: of a parameter, a view of one, or what is derived from some."""
        geometry = self._geometry(tensor)
        if geometry is not None:
            one = self._by_tensor[id(_base(tensor))]
            use = Use(tensor, [one], self._delivered)
            one.direct.append((use, geometry))
            return use
        sums = [self._by_tensor[id(leaf)] for leaf in leaves(tensor) if self.holds(leaf)]
        use = Use(tensor, sums, self._delivered)
        for one in sums:
            one.derived.append(use)
        return use

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
        for one in self._by_tensor.values():
            one.outstanding = len(one.direct)
            for use in self._uses(one):
                use.gradient = None

    @torch.no_grad()
    def finish_pass(self) -> None:
        """After each backward: square what is still open, derived tensors among it."""
        done: set[int] = set()
        for one in self._by_tensor.values():
            if id(one) in done:
                continue
            group = self._connected(one)
            done.update(id(member) for member in group)
            self._show(group)
            if any(member.derived for member in group):
                square_derived(group, self.num_examples)
            elif any(use.gradient is not None for use, _ in one.direct):
                square(one, self.num_examples)

    def _uses(self, one: SquareSum) -> list[Use]:
        return [use for use, _ in one.direct] + one.derived

    def _delivered(self, use: Use) -> None:
        if len(use.sums) != 1:
            return
        one = use.sums[0]
        if one.derived or not one.direct:
            return
        one.outstanding -= 1
        if one.outstanding == 0:
            self._show([one])
            square(one, self.num_examples)

    def _show(self, group: list[SquareSum]) -> None:
        if self._watched is not None:
            example, see = self._watched
            for name, gradient in gradients_of(group, example):
                see(name, gradient)

    def _connected(self, one: SquareSum) -> list[SquareSum]:
        """The sums that share derived tensors with `one`, itself included."""
        group, queue = [one], [one]
        while queue:
            for use in queue.pop().derived:
                for other in use.sums:
                    if not any(other is member for member in group):
                        group.append(other)
                        queue.append(other)
        return group


def _base(tensor: Tensor) -> Tensor:
    base = tensor._base
    return tensor if base is None else base
