"""The ways to run a batch where each process holds the whole model and has examples of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from hf_ewc.fisher.engine.one_backward import OneBackward
from hf_ewc.fisher.engine.one_by_one import BatchGradient, OneByOne
from hf_ewc.fisher.engine.protocol import Engine, Objectives
from hf_ewc.fisher.engine.verification import Comparison, compare
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.passes import Passes
from hf_ewc.fisher.processes import Processes


class Replicas:
    """Each process runs its own examples; the sums meet at the end.

    Args:
        model: the unwrapped model, in eval mode.
        parameters: those to estimate the Fisher of, by name.
        processes: those that take part, each with its share of the examples.
        one_by_one: whether the slow way is that of single examples, else that of whole batches.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        processes: Processes,
        *,
        one_by_one: bool = True,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._processes = processes
        self._device = next(iter(parameters.values())).device
        self._fast = OneBackward(model, parameters)
        self._slow_type = OneByOne if one_by_one else BatchGradient
        self._slow: Engine | None = None

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def first(self, source: Source) -> ExampleBatch | None:
        first = source.first() if self._processes.size > 1 else None
        return None if first is None else first.to(self._device)

    def batches(self, source: Source) -> Iterator[ExampleBatch]:
        for batch in source.batches:
            yield batch.to(self._device)

    def pair(self, batch: ExampleBatch | None) -> ExampleBatch | None:
        return batch.pair() if batch is not None and len(batch) > 1 else None

    def compare(self, pair: ExampleBatch, objectives: Objectives) -> Comparison:
        return compare(self._model, self._parameters, pair, objectives)

    def run_fast(self, batch: ExampleBatch | None, passes: Passes) -> None:
        if batch is not None and len(batch) == 1:
            self.run_slow(batch, passes)
        elif batch is not None:
            self._fast.add(batch, passes)

    def run_slow(self, batch: ExampleBatch | None, passes: Passes) -> None:
        if self._slow is None:
            self._slow = self._slow_type(self._model, self._parameters, self._fast.totals())
        if batch is not None:
            self._slow.add(batch, passes)

    def totals(self) -> dict[str, Tensor]:
        totals = self._fast.totals()
        self._processes.add_up(totals)
        return totals
