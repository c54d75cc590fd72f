"""The ways to run a batch where each process holds the whole model and has examples of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping

from torch import Tensor, nn

from hf_ewc.fisher.engine.one_backward import OneBackward
from hf_ewc.fisher.engine.one_by_one import BatchGradient, OneByOne
from hf_ewc.fisher.engine.protocol import Engine
from hf_ewc.fisher.engine.verification import (
    Comparison,
    Sketch,
    compare_with_alone,
    is_what_it_was,
    require_apart,
)
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.examples.structure import structure_of
from hf_ewc.fisher.memory import is_out_of_memory
from hf_ewc.fisher.passes import Passes
from hf_ewc.fisher.processes import Processes
from hf_ewc.fisher.proofs import Mixed, Proofs


class Replicas:
    """Each process runs its own examples; the sums meet at the end.

    Args:
        model: the unwrapped model, in eval mode.
        parameters: those to estimate the Fisher of, by name.
        processes: those that take part, each with its share of the examples.
        one_by_one: whether the slow way is that of single examples, else that of whole batches.
    """

    alone_may_help = True

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
        self._added = False
        self._confirmed: set[Hashable] = set()  # structures of batches that are a row each

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def first(self, source: Source) -> ExampleBatch | None:
        first = source.first() if self._processes.size > 1 else None
        return None if first is None else first.to(self._device)

    def batches(self, source: Source) -> Iterator[ExampleBatch]:
        for batch in source.batches:
            yield batch.to(self._device)

    def run_fast(self, batch: ExampleBatch | None, passes: Passes, proofs: Proofs) -> None:
        if batch is None:
            return
        if len(batch) == 1 or batch.uneven:
            self.run_slow(batch, passes)
            return
        if batch.doubtful:
            require_apart(batch, passes.outputs)
        structure = structure_of(batch.inputs, len(batch))
        pair = batch.telling_pair()
        if pair is None or not proofs.are_due(structure, self._fast.totals()):
            self._fast.add(batch, passes)
        else:
            proofs.add(structure, self._run_with_proof(batch, passes, proofs, *pair))
        self._added = True

    def _run_with_proof(
        self, batch: ExampleBatch, passes: Passes, proofs: Proofs, example: int, other: int
    ) -> Comparison:
        """Run the batch and compare one example, and another's outputs, with it alone.

        Raises:
            Mixed: they differ.
        """
        before = {name: t.clone() for name, t in self._fast.totals().items() if self._added}
        unproved = proofs.unproved(before)
        sketch = Sketch(example)
        try:
            with passes.deciding_once(), passes.noting_output_of(other) as among:
                self._fast.add(batch, passes, sketch)
                with passes.uncounted():
                    found = compare_with_alone(self._model, self._parameters, batch, passes, sketch)
            wrong = found.wrong
            if (
                among
                and not wrong
                and not self._is_what_it_was(batch.only([other]), among[0], passes)
            ):
                wrong = sorted(found.proved)
            if wrong:
                raise Mixed(wrong, sorted(set(wrong) & set(unproved)))
        except Exception as error:
            for name, total in self._fast.totals().items():
                total.copy_(before[name]) if self._added else total.zero_()
            self._fast.added_in_part = False
            if not is_out_of_memory(error):
                self._confirm(batch, passes)
            raise
        return found

    def _is_what_it_was(self, one: ExampleBatch, among: Tensor, passes: Passes) -> bool:
        return is_what_it_was(self._model, self._parameters, one, among, passes.outputs)

    def run_slow(self, batch: ExampleBatch | None, passes: Passes) -> None:
        if self._slow is None:
            self._slow = self._slow_type(self._model, self._parameters, self._fast.totals())
        if batch is None:
            return
        self._confirm(batch, passes)
        self._slow.add(batch, passes)
        self._added = True

    def _confirm(self, batch: ExampleBatch, passes: Passes) -> None:
        """Refuse to take out of a batch what may be no example; once for those alike, if plain."""
        structure = structure_of(batch.inputs, len(batch))
        known = self._slow_type is BatchGradient or structure in self._confirmed
        if batch.doubtful or (batch.unconfirmed and not known):
            require_apart(batch, passes.outputs)
            self._confirmed.add(structure)

    def undo(self) -> bool:
        if self._fast.added_in_part and self._added:
            return False
        if self._fast.added_in_part:
            self.begin_again()
        return True

    def begin_again(self) -> None:
        for total in self._fast.totals().values():
            total.zero_()
        self._fast.added_in_part = self._added = False

    def totals(self) -> dict[str, Tensor]:
        totals = self._fast.totals()
        self._processes.add_up(totals)
        return totals
