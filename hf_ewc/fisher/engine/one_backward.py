"""Squared per-example gradients of a batch: one backward for all examples, or one for each."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from torch import Tensor, nn

from hf_ewc.fisher.engine.backward import run_backward
from hf_ewc.fisher.engine.checkpointing import checkpointing
from hf_ewc.fisher.engine.interception import Interception
from hf_ewc.fisher.engine.protocol import Objectives, UncoveredUse, Witness
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.uses.ledger import Ledger
from hf_ewc.fisher.uses.tracking import Tracker


class OneBackward:
    """All examples in one backward, by interception of the forward's operations.

    Attributes:
        added_in_part: whether a batch that ended in an error may have been added in part.
    """

    added_in_part = False

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ledger: Ledger | None = None,
    ) -> None:
        self._model = model
        self._ledger = Ledger(parameters) if ledger is None else ledger

    def add(
        self, batch: ExampleBatch, objectives: Objectives, witness: Witness | None = None
    ) -> None:
        """Raises `UncoveredUse`, with nothing added, where a use is not accounted for.

        A witness sees the gradients of one example of the batch.
        """
        self._ledger.start(len(batch))
        if witness is not None:
            self._ledger.watch(witness.example, witness.see)
        try:
            self._add(batch, objectives)
            self.added_in_part = False
        finally:
            self._ledger.finish()

    def _add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        mode = Interception(Tracker(self._ledger, batch.inputs, len(batch)))

        def contexts() -> tuple[object, object]:
            return contextlib.nullcontext(), mode.recomputation()

        with checkpointing(self._model, contexts):
            stream = objectives(batch)
            with mode:
                objective = next(stream, None)
            if objective is not None:
                self._refuse(mode.uncovered_uses(objective))
            while objective is not None:
                following = next(stream, None)
                self._backward(objective, keep=following is not None)
                objective = following

    def _refuse(self, uncovered: list[tuple[str, str]]) -> None:
        if uncovered:
            raise UncoveredUse(_described(uncovered))

    def _backward(self, objective: Tensor, *, keep: bool) -> None:
        self._ledger.start_pass()
        self.added_in_part = True
        if objective.requires_grad:
            run_backward(objective, keep=keep)
        self._ledger.finish_pass()

    def totals(self) -> dict[str, Tensor]:
        return self._ledger.totals()


def _described(uncovered: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} (in {operation})" for name, operation in uncovered[:5])
    more = f" and {len(uncovered) - 5} more" if len(uncovered) > 5 else ""
    return shown + more
