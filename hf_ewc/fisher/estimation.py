"""One estimate under way: from batches to sums of squares."""

from __future__ import annotations

import contextlib
import inspect
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointError

from hf_ewc.fisher.counts import Counts
from hf_ewc.fisher.engine.protocol import UncoveredUse
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.labels import require_labels
from hf_ewc.fisher.memory import is_out_of_memory, release_memory
from hf_ewc.fisher.passes import Passes, Plan
from hf_ewc.fisher.proofs import Mixed, Proofs

logger = logging.getLogger("hf_ewc")

# Shows how far the batches have come.
ProgressBar = Callable[[Iterable[Any]], Iterable[Any]]


class Ways(Protocol):
    """The ways in which the processes at hand can run a batch.

    `None` in place of a batch is for a process that has no more while others do.
    `alone_may_help` says whether examples can be run alone where a forward fails on several.
    """

    alone_may_help: bool

    def running(self) -> AbstractContextManager[None]:
        """Around everything that runs the model."""

    def together(self) -> AbstractContextManager[None]:
        """Around what one process may refuse: the others hear of it where they wait for it."""

    def first(self, source: Source) -> ExampleBatch | None:
        """The batch with the very first example, where "auto" needs one that all have."""

    def batches(self, source: Source) -> Iterator[ExampleBatch | None]: ...

    def run_fast(self, batch: ExampleBatch | None, passes: Passes, proofs: Proofs) -> None:
        """All examples in one backward, proved where that is due.

        Raises:
            UncoveredUse, Mixed: with nothing added.
        """

    def run_slow(self, batch: ExampleBatch | None, passes: Passes) -> None:
        """By a way that takes any model."""

    def undo(self) -> bool:
        """Take off what a batch that ended in an error has added; False where that cannot be."""

    def begin_again(self) -> None:
        """No batch has been added yet."""

    def totals(self) -> dict[str, Tensor]:
        """Σ over the examples of all processes of the squared gradients, by name."""


class Estimation:
    """Runs batches the fast way for as long as it is proved, then the slow one.

    Args:
        ways: how the processes at hand run a batch.
        passes: the objectives of a batch.
        plan: how the Fisher is to be taken.
        model: the unwrapped one.
        proofs: what has been proved of it.
        speaks: whether warnings are this process's to give.
    """

    def __init__(
        self,
        ways: Ways,
        passes: Passes,
        plan: Plan,
        model: nn.Module,
        proofs: Proofs,
        speaks: bool,
    ) -> None:
        self.slow_because: str | None = None
        self._ways = ways
        self._passes = passes
        self._plan = plan
        self._model = model
        self._model_name = type(model).__name__
        self._proofs = proofs
        self._speaks = speaks
        self._fast = plan.fisher_type != "batched"
        self._said_apart = False
        self._advice = ""
        self._most: int | None = None  # examples of a batch that fit in memory, once it ran out

    @property
    def counts(self) -> Counts:
        return self._passes.counts

    @property
    def fisher_type(self) -> str:
        return self._passes.fisher_type

    def totals(self) -> dict[str, Tensor]:
        """Σ over the examples of all processes of the squared gradients, by name."""
        return self._ways.totals()

    def consume(
        self, source: Source, bar: ProgressBar, again: Callable[[], Source] | None = None
    ) -> None:
        """Add up the squares of all batches of this process.

        Args:
            again: the same source from its beginning, for when memory runs out within a backward;
                None where the data can be read once only.
        """
        self._advice = source.advice
        with self._ways.running():
            first = self._ways.first(source)
            if first is not None:
                self._settle_type(first)
            least = 0
            while not self._whole(source, bar):
                least = max(least, self.counts.examples)
                source = self._from_its_beginning(again)
        if self.counts.examples < least:
            raise ValueError(
                f"The data gave {least} examples, and {self.counts.examples} when they were read "
                "again since memory ran out. Give a data set, or smaller batches."
            )

    def _settle_type(self, first: ExampleBatch) -> None:
        try:
            self._passes.settle_type(first)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(first, error) from error

    def _whole(self, source: Source, bar: ProgressBar) -> bool:
        """Whether all batches were added; else the sums hold a part of one, and are of no use."""
        try:
            for batch in bar(self._ways.batches(source)):
                self._add_parts(batch)
        except _AddedInPart:
            return False
        return True

    def _from_its_beginning(self, again: Callable[[], Source] | None) -> Source:
        if again is None:
            raise torch.OutOfMemoryError(
                "Memory ran out within a backward of the Fisher, and the data, an iterator, cannot "
                "be read again for smaller batches. Give a data set, or smaller batches."
            )
        self._ways.begin_again()
        self._passes.begin_again()
        return again()

    def _add_parts(self, batch: ExampleBatch | None) -> None:
        """Add the batch in parts of as many examples as fit in memory, as far as that is known."""
        most = self._most
        if most is None or batch is None or len(batch) <= most or not self._can_cut(batch):
            self._add_in_memory(batch)
            return
        for start in range(0, len(batch), most):
            self._add_parts(batch.part(start, start + most))

    def _can_cut(self, batch: ExampleBatch) -> bool:
        """Whether smaller batches help, and give the same."""
        helps = self._fast and self._ways.alone_may_help
        return helps and len(batch) > 1 and batch.divisible and not batch.uneven

    def _add_in_memory(self, batch: ExampleBatch | None) -> None:
        """Add the batch, by halves where it does not fit in memory, which is remembered."""
        try:
            self._add(batch)
            return
        except Exception as error:
            if batch is None or not is_out_of_memory(error):
                raise
            if not self._can_cut(batch):
                raise self._too_large(batch, error) from error
            short = f"{error!s:.200}"
        release_memory()  # which the error held until here
        self._most = (len(batch) + 1) // 2
        logger.warning(
            "A batch of %d examples of the Fisher does not fit in memory (%s); going on with %d.",
            len(batch),
            short,
            self._most,
        )
        if not self._ways.undo():
            raise _AddedInPart
        self._add_parts(batch)

    def _too_large(self, batch: ExampleBatch, error: Exception) -> Exception:
        """What does not fit, and what helps."""
        if len(batch) == 1 or (not self._fast and self._plan.fisher_type != "batched"):
            what, helps = "One example of the Fisher does", "shorter examples"
        else:
            what = f"A batch of {len(batch)} examples of the Fisher does"
            helps = "a smaller batch_size (fisher_batch_size)"
            if not self._ways.alone_may_help:
                what = f"Of parameters in shards, a batch of {len(batch)} examples does"
        found = torch.OutOfMemoryError(
            f"{what} not fit in memory: {error!s:.200} What helps: {helps}, gradient "
            "checkpointing, fewer parameters (ewc_target_modules), or half precision."
        )
        if not self._ways.alone_may_help:
            # The launcher may show the error of another process, which only lost this one.
            logger.error("%s: %s", type(found).__name__, found)
        return found

    def _add(self, batch: ExampleBatch | None) -> None:
        with self._ways.together():
            self._inspect(batch)
        if self._fast:
            try:
                with self._passes.counted_if_done(), self._explained(batch):
                    self._ways.run_fast(batch, self._passes, self._proofs)
                return
            except (UncoveredUse, CheckpointError, Mixed, ForwardFailed) as error:
                self._fall_back(self._reason(error))
        with self._explained(batch):
            self._ways.run_slow(batch, self._passes)

    @contextlib.contextmanager
    def _explained(self, batch: ExampleBatch | None) -> Iterator[None]:
        """Errors of the model's own forward, with what to do."""
        try:
            yield
        except (UncoveredUse, CheckpointError, Mixed):
            raise
        except Exception as error:
            if batch is None or is_out_of_memory(error) or not raised_in(self._model, error):
                raise
            advice = self._advice + _advice_on_batch_norms(self._model)
            advice += _advice_on_names(self._model, batch)
            raise ForwardFailed(batch, error, advice) from error

    def _reason(self, error: Exception) -> str:
        """Why the fast way is left; raises where the slow one does not help."""
        if isinstance(error, CheckpointError):
            return "a checkpoint of the model's own runs its forward again out of sight"
        if isinstance(error, ForwardFailed):
            if len(error.batch) == 1 or not self._ways.alone_may_help:
                raise error
            self._try_alone(error.batch.only([0]))
            return f"its forward fails on several examples at once ({error.short})"
        if not isinstance(error, Mixed):
            return f"these parameters are used in ways it does not cover: {error}"
        if error.earlier:
            raise ValueError(
                f"The one-backward Fisher of {self._model_name} differs from single "
                f"examples in {', '.join(error.earlier[:5])}, which the first batches did not "
                "show. Use batch_size=1 (fisher_batch_size=1), which is exact and slower."
            )
        return f"it differs from single examples in {error}"

    def _try_alone(self, one: ExampleBatch) -> None:
        """Raise what an example alone raises too, before others are told to be run so."""
        with self._explained(one), self._passes.uncounted(), torch.no_grad():
            next(self._passes(one), None)

    def _inspect(self, batch: ExampleBatch | None) -> None:
        """Refuse what cannot be run, and say once of what cannot be run fast."""
        if batch is None:
            return
        if self._plan.log_likelihood is None:
            require_labels(batch.inputs)
            batch.require_label_rows()
        because = batch.apart_because or (batch.uneven if self._fast else None)
        if because is None or self._said_apart:
            return
        self._said_apart = True
        said = f"The examples of a batch are not a row each: {because}."
        if self._plan.fallback == "error":
            raise ValueError(
                f"{said} Use fallback='warn' to run such batches one by one, or batch_size=1 "
                "(fisher_batch_size=1)."
            )
        warnings.warn(
            f"{said} Such batches are run one by one, which is exact and slower, as with "
            "batch_size=1 (fisher_batch_size=1).",
            stacklevel=5,
        )

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


class _AddedInPart(Exception):
    """A batch was added in part, and what it added cannot be told from the batches before it."""


class ForwardFailed(ValueError):
    """The model's forward has failed on a batch; `advice` is on what the data were taken for."""

    def __init__(self, batch: ExampleBatch, error: Exception, advice: str = "") -> None:
        self.batch = batch
        self.short = f"{type(error).__name__}: {error!s:.300}"
        super().__init__(
            f"The model's forward fails on a batch of {len(batch)} examples with the arguments "
            f"{', '.join(batch.inputs)}: {self.short} {advice}What helps: data with what "
            "its forward takes and nothing else (a data_collator, without further columns); "
            "batch_size=1 (fisher_batch_size=1) where it takes one example at a time, as without a "
            "pad token; or log_likelihood= a function of (model, batch) that calls it as it has to "
            "be."
        )


def _advice_on_batch_norms(model: nn.Module) -> str:
    """Of norms over the batch at hand, by which an example has no output of its own."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    if not names:
        return ""
    return (
        f"The batch norms {', '.join(names[:5])} have no running statistics and take those of the "
        "batch, so that an example alone has no likelihood: set track_running_stats=True, or put "
        "norms of single examples (GroupNorm, LayerNorm) in their place. "
    )


def _advice_on_names(model: nn.Module, batch: ExampleBatch) -> str:
    """Of a batch that a forward takes nothing of, as where a trainer makes its own features."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any or parameters.keys() & batch.inputs.keys():
        return ""
    return (
        f"Its forward takes none of these but {', '.join(parameters)}, so that log_likelihood= is "
        "what is needed here. "
    )


def raised_in(model: nn.Module, error: Exception) -> bool:
    """Whether the model itself was running when an error came up."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_locals.get("self") is model for frame, _ in frames)


def warn_of_slowness(reason: str, stacklevel: int) -> None:
    """Say that the one-backward engine is not used, and why."""
    warnings.warn(
        f"The one-backward Fisher {reason} Examples are run one by one, which is exact and slower.",
        stacklevel=stacklevel + 1,
    )
