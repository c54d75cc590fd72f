"""One estimate under way: from batches to sums of squares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from hf_ewc.fisher.engine.one_backward import OneBackward
from hf_ewc.fisher.engine.one_by_one import BatchGradient, OneByOne
from hf_ewc.fisher.engine.protocol import Engine, UncoveredUse
from hf_ewc.fisher.engine.verification import Comparison, compare
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.choice import uniforms
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.labels import require_labels
from hf_ewc.fisher.likelihood.distributions import Distribution
from hf_ewc.fisher.likelihood.outputs import LabelReader
from hf_ewc.fisher.team import Team

# `auto` takes the exact expectation up to this many backward passes, and samples above.
MAX_EXACT_PASSES = 9
# The batches, counted from 0, at which parameters without a gradient so far are looked at again.
_LATER_PROOFS = (1, 3, 7)
LogLikelihood = Callable[[nn.Module, dict[str, Any]], Tensor]
# Shows how far the batches have come.
ProgressBar = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Plan:
    """How the Fisher is to be taken.

    Args:
        fisher_type, seed, num_draws, fallback, log_likelihood: see `estimate_fisher`.
        scale: of the objectives, divided out of the squares at the end.
    """

    fisher_type: str = "auto"
    seed: int = 0
    num_draws: int = 1
    fallback: str = "warn"
    log_likelihood: LogLikelihood | None = None
    scale: float = 1.0


class Run:
    """The engine in use, and the examples counted so far, of one process.

    Args:
        model: the unwrapped model, in eval mode.
        parameters: those to estimate the Fisher of, by name.
        plan: how.
        team: the processes that take part, each with its share of the examples.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], plan: Plan, team: Team
    ) -> None:
        self.num_examples = 0
        self.fisher_type = plan.fisher_type
        self.slow_because: str | None = None
        self._model = model
        self._parameters = parameters
        self._plan = plan
        self._team = team
        self._reader = LabelReader(model)
        self._device = next(iter(parameters.values())).device
        self._seen = 0
        self._proved: set[str] = set()
        self._engine: Engine = self._first_engine()

    def _first_engine(self) -> Engine:
        if self._plan.fisher_type == "batched":
            return BatchGradient(self._model, self._parameters)
        return OneBackward(self._model, self._parameters)

    def consume(self, source: Source, bar: ProgressBar) -> None:
        """Add up the squares of all batches of this process."""
        self._settle_type(source)
        for batch in bar(source.batches):
            self.add(batch.to(self._device))

    def totals(self) -> dict[str, Tensor]:
        """Σ over the examples of all processes of the squared gradients, by name."""
        totals = self._engine.totals()
        self._team.add_up(totals)
        return totals

    def _settle_type(self, source: Source) -> None:
        """What "auto" means in all processes, by an example that all of them have."""
        first = source.first() if self.fisher_type == "auto" and self._team.size > 1 else None
        if first is None:
            return
        with torch.no_grad():
            next(self._objectives(first.to(self._device)), None)
        self.num_examples = 0
        # A single example may not tell how labels are shifted: that is found by the first batch.
        self._reader = LabelReader(self._model)

    def _settled_type(self, distribution: Distribution) -> str:
        """By the very first example, so that it does not depend on the size of the batches."""
        if self.fisher_type != "auto":
            return self.fisher_type
        few = distribution.first_example().num_exact_passes <= MAX_EXACT_PASSES
        return "exact" if few else "sampled"

    def add(self, batch: ExampleBatch) -> None:
        if self._plan.log_likelihood is None:
            require_labels(batch.inputs)
        if len(batch) > 1 and self._is_to_verify():
            self._verify(batch)
        self._seen += 1
        if isinstance(self._engine, OneBackward) and len(batch) == 1:
            OneByOne(self._model, self._parameters, self._engine.totals()).add(
                batch, self._objectives
            )
        else:
            self._add(batch)

    def _add(self, batch: ExampleBatch) -> None:
        counted = self.num_examples
        try:
            self._engine.add(batch, self._objectives)
        except (UncoveredUse, CheckpointError) as uncovered:
            self.num_examples = counted
            self._fall_back(_reason(uncovered))
            self._engine.add(batch, self._objectives)

    def _is_to_verify(self) -> bool:
        """At the first batch with labels; thrice again for parameters that had no gradient there.

        So it is with experts that got no token.
        """
        if not isinstance(self._engine, OneBackward):
            return False
        return not self._proved or (
            self._seen in _LATER_PROOFS and len(self._proved) < len(self._parameters)
        )

    def _verify(self, batch: ExampleBatch) -> None:
        pair = batch.pair()
        if pair is None:
            return
        counted = self.num_examples
        try:
            found = self._compare(pair)
        except (UncoveredUse, CheckpointError) as uncovered:
            self._fall_back(_reason(uncovered))
        else:
            if found.wrong and self._proved:
                raise ValueError(
                    f"The one-backward Fisher of {type(self._model).__name__} differs from single "
                    f"examples in {', '.join(found.wrong[:5])}, which the first batches did not "
                    "show. Use batch_size=1 (fisher_batch_size=1), which is exact and slower."
                )
            if found.wrong:
                self._fall_back(f"it differs from single examples in {', '.join(found.wrong[:5])}")
            self._proved |= found.proved
        self.num_examples = counted

    def _compare(self, pair: ExampleBatch) -> Comparison:
        return compare(self._model, self._parameters, pair, self._objectives)

    def _fall_back(self, reason: str) -> None:
        self.slow_because = f"is not exact for {type(self._model).__name__}: {reason}."
        if self._plan.fallback == "error":
            raise ValueError(
                f"The one-backward Fisher {self.slow_because} Use fallback='warn' to run examples "
                "one by one, or select other parameters."
            )
        if self._team.rank == 0:
            warn_of_slowness(self.slow_because, stacklevel=3)
        self._engine = self._slow_engine()

    def _slow_engine(self) -> Engine:
        return OneByOne(self._model, self._parameters, self._engine.totals())

    def _objectives(self, batch: ExampleBatch) -> Iterator[Tensor]:
        """Forward, then one scalar per backward pass, checked and scaled."""
        kept = torch.arange(len(batch), device=self._device) < len(batch) - batch.padding
        if self._plan.log_likelihood is not None:
            values = self._plan.log_likelihood(self._model, batch.inputs)
            _check_values(values, batch)
            self.num_examples += len(batch) - batch.padding
            self.fisher_type = "batched" if self._plan.fisher_type == "batched" else "empirical"
            values = torch.where(kept, values, values.detach()) if batch.padding else values
            yield _checked_objective(values.sum(), batch) * self._plan.scale
            return
        distribution = self._reader.distribution(batch.inputs)
        if batch.padding:
            distribution = distribution.without(~kept)
        self.num_examples += int((distribution.labelled & kept).sum())
        self.fisher_type = self._settled_type(distribution)
        for objective in self._passes(distribution, batch.ids):
            yield _checked_objective(objective, batch) * self._plan.scale

    def _passes(self, distribution: Distribution, ids: Sequence[int]) -> Iterator[Tensor]:
        if self.fisher_type == "exact":
            yield from distribution.exact()
        elif self.fisher_type == "sampled":
            for draw in range(self._plan.num_draws):

                def numbers(count: int, n: int, draw: int = draw) -> Tensor:
                    return uniforms(self._plan.seed, ids[n], draw, count)

                yield distribution.sampled(numbers) / self._plan.num_draws**0.5
        else:
            yield distribution.empirical()


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


def _checked_objective(objective: Tensor, batch: ExampleBatch) -> Tensor:
    if not torch.isfinite(objective):
        raise ValueError(
            f"The log-likelihood is {objective.item()} on the batch of examples {batch.ids}; the "
            "Fisher needs finite outputs. Look for NaN in the weights or in these examples."
        )
    return objective


def _check_values(values: Tensor, batch: ExampleBatch) -> None:
    if values.shape != (len(batch),):
        raise ValueError(
            f"log_likelihood returned shape {tuple(values.shape)} for {len(batch)} examples; it "
            "must return log p(y|x) of each, shape (batch,)."
        )
