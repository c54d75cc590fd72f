"""One estimate under way: from batches to sums of squares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hf_ewc.fisher.engine.protocol import Objectives, UncoveredUse
from hf_ewc.fisher.engine.verification import Comparison
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.labels import require_labels
from hf_ewc.fisher.passes import Passes, Plan

# The batches, counted from 0, at which parameters without a gradient so far are looked at again.
_LATER_PROOFS = (1, 3, 7)
# Shows how far the batches have come.
ProgressBar = Callable[[Iterable[Any]], Iterable[Any]]


class Ways(Protocol):
    """The ways in which the processes at hand can run a batch.

    `None` in place of a batch is for a process that has no more while others do.
    """

    def running(self) -> AbstractContextManager[None]:
        """Around everything that runs the model."""

    def first(self, source: Source) -> ExampleBatch | None:
        """The batch with the very first example, where "auto" needs one that all have."""

    def batches(self, source: Source) -> Iterator[ExampleBatch | None]: ...

    def pair(self, batch: ExampleBatch | None) -> ExampleBatch | None:
        """Two examples to compare the fast way and the slow one on; None if there are none."""

    def compare(self, pair: ExampleBatch, objectives: Objectives) -> Comparison: ...

    def run_fast(self, batch: ExampleBatch | None, passes: Passes) -> None:
        """All examples in one backward; raises `UncoveredUse`, with nothing added."""

    def run_slow(self, batch: ExampleBatch | None, passes: Passes) -> None:
        """By a way that takes any model."""

    def totals(self) -> dict[str, Tensor]:
        """Σ over the examples of all processes of the squared gradients, by name."""


class Estimation:
    """Runs batches the fast way for as long as it is proved, then the slow one.

    Args:
        ways: how the processes at hand run a batch.
        passes: the objectives of a batch.
        plan: how the Fisher is to be taken.
        num_parameters: how many there are to prove.
        model_name: for messages.
        speaks: whether warnings are this process's to give.
    """

    def __init__(
        self,
        ways: Ways,
        passes: Passes,
        plan: Plan,
        num_parameters: int,
        model_name: str,
        speaks: bool,
    ) -> None:
        self.slow_because: str | None = None
        self._ways = ways
        self._passes = passes
        self._plan = plan
        self._num_parameters = num_parameters
        self._model_name = model_name
        self._speaks = speaks
        self._fast = plan.fisher_type != "batched"
        self._seen = 0
        self._proved: set[str] = set()

    @property
    def num_examples(self) -> int:
        return self._passes.num_examples

    @property
    def fisher_type(self) -> str:
        return self._passes.fisher_type

    def totals(self) -> dict[str, Tensor]:
        """Σ over the examples of all processes of the squared gradients, by name."""
        return self._ways.totals()

    def consume(self, source: Source, bar: ProgressBar) -> None:
        """Add up the squares of all batches of this process."""
        with self._ways.running():
            first = self._ways.first(source)
            if first is not None:
                self._passes.settle_type(first)
            for batch in bar(self._ways.batches(source)):
                self._add(batch)

    def _add(self, batch: ExampleBatch | None) -> None:
        if batch is not None and self._plan.log_likelihood is None:
            require_labels(batch.inputs)
        if self._proof_is_due():
            self._prove(batch)
        self._seen += 1
        if self._fast:
            try:
                with self._passes.counted_if_done():
                    self._ways.run_fast(batch, self._passes)
                return
            except (UncoveredUse, CheckpointError) as error:
                self._fall_back(_reason(error))
        self._ways.run_slow(batch, self._passes)

    def _proof_is_due(self) -> bool:
        """At the first batch with labels; thrice again for parameters that had no gradient there.

        So it is with experts that got no token.
        """
        if not self._fast:
            return False
        return not self._proved or (
            self._seen in _LATER_PROOFS and len(self._proved) < self._num_parameters
        )

    def _prove(self, batch: ExampleBatch | None) -> None:
        pair = self._ways.pair(batch)
        if pair is None:
            return
        try:
            with self._passes.uncounted():
                found = self._ways.compare(pair, self._passes)
        except (UncoveredUse, CheckpointError) as error:
            self._fall_back(_reason(error))
            return
        if found.wrong and self._proved:
            raise ValueError(
                f"The one-backward Fisher of {self._model_name} differs from single "
                f"examples in {', '.join(found.wrong[:5])}, which the first batches did not "
                "show. Use batch_size=1 (fisher_batch_size=1), which is exact and slower."
            )
        if found.wrong:
            self._fall_back(f"it differs from single examples in {', '.join(found.wrong[:5])}")
        self._proved |= found.proved

    def _fall_back(self, reason: str) -> None:
        self.slow_because = f"is not exact for {self._model_name}: {reason}."
        if self._plan.fallback == "error":
            raise ValueError(
                f"The one-backward Fisher {self.slow_because} Use fallback='warn' to run examples "
                "one by one, or select other parameters."
            )
        if self._speaks:
            warn_of_slowness(self.slow_because, stacklevel=3)
        self._fast = False


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return "a checkpoint of the model's own runs its forward again out of sight"
    return f"these parameters are used in ways it does not cover: {error}"


def warn_of_slowness(reason: str, stacklevel: int) -> None:
    """Say that the one-backward engine is not used, and why."""
    warnings.warn(
        f"The one-backward Fisher {reason} Examples are run one by one, which is exact and slower.",
        stacklevel=stacklevel + 1,
    )
