"""What an engine is: batches in, sums of squared per-example gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.uses.product import Product

# Runs the forward on a batch and yields the objectives to backpropagate, one after another.
Objectives = Callable[[ExampleBatch], Iterator[Tensor]]
# Runs the forward on a batch and returns what the objectives are made of, (B, …).
Outputs = Callable[[ExampleBatch], Tensor]


class UncoveredUse(Exception):
    """A parameter is used in a way that the one-backward engine does not account for."""


class Witness(Protocol):
    """Sees the gradients of one example of a batch, one parameter after another in each pass."""

    @property
    def example(self) -> int: ...

    def see(self, name: str, gradient: Tensor | Product) -> None:
        """`gradient` is G or, of several whose sum it is, one."""


class Engine(Protocol):
    """Adds Σ_n G_n² of a batch to totals by parameter name."""

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None: ...

    def totals(self) -> dict[str, Tensor]: ...
