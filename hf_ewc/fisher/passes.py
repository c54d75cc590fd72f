"""From a batch to what is backpropagated: the forward, then one objective for each pass."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ewc.fisher.counts import Counts, counted
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.choice import uniforms
from hf_ewc.fisher.likelihood.choices import Choices, Decided
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.fisher.likelihood.own_loss import StatedLoss
from hf_ewc.fisher.likelihood.reader import LabelReader
from hf_ewc.fisher.likelihood.slices import unseen

# `auto` takes the exact expectation up to this many backward passes, and samples above.
MAX_EXACT_PASSES = 9
# What "exact" is refused above.
_TOO_MANY_PASSES = 1000
LogLikelihood = Callable[[nn.Module, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Plan:
    """How the Fisher is to be taken.

    Args:
        fisher_type, seed, num_draws, fallback, log_likelihood, stated: see `estimate_fisher`.
        scale: of the objectives, divided out of the squares at the end.
    """

    fisher_type: str = "auto"
    seed: int = 0
    num_draws: int = 1
    fallback: str = "warn"
    log_likelihood: LogLikelihood | None = None
    scale: float = 1.0
    stated: Sequence[StatedLoss] = ()


class Passes:
    """Yields the objectives of a batch, checked and scaled, and counts its examples.

    Args:
        model: the unwrapped model, in eval mode.
        plan: how the Fisher is to be taken.
        never_none: whether a batch without a label still yields an objective, of gradient zero, so
            that a backward follows its forward.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, never_none: bool = False) -> None:
        self.counts = Counts()
        self.fisher_type = plan.fisher_type
        self._model = model
        self._plan = plan
        self._never_none = never_none
        self._reader = LabelReader(model, in_full=never_none, stated=plan.stated)
        self._decided: Decided | None = None
        self._noting: tuple[int, list[Tensor]] | None = None

    def __call__(self, batch: ExampleBatch) -> Iterator[Tensor]:
        """The objectives; what the model's outputs mean is settled now, before it runs for them."""
        if self._plan.log_likelihood is None:
            self._reader.settle(batch)
        return self._scaled(batch)

    def outputs(self, batch: ExampleBatch) -> Tensor:
        """What the objectives are made of, (B, …)."""
        if self._plan.log_likelihood is not None:
            values = self._plan.log_likelihood(self._model, copy.copy(batch.inputs))
            _check_values(values, batch)
            return values
        self._reader.settle(batch)
        return self._distribution(batch).graph_output()

    def _distribution(self, batch: ExampleBatch) -> Distribution:
        return self._reader.distribution(batch.inputs, padded_here=batch.padded_here)

    def settle_type(self, first: ExampleBatch) -> None:
        """What outputs and "auto" mean, by an example that all processes have."""
        if self.fisher_type == "auto" or self._plan.log_likelihood is None:
            with self.uncounted(), torch.no_grad():
                next(self(first), None)

    def begin_again(self) -> None:
        """No example has been counted yet."""
        self.counts = Counts()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """The examples of passes inside do not count."""
        before = self.counts
        try:
            yield
        finally:
            self.counts = before

    @contextlib.contextmanager
    def deciding_once(self) -> Iterator[None]:
        """What is drawn for an example inside is drawn again for it, whatever its outputs then."""
        self._decided = {}
        try:
            yield
        finally:
            self._decided = None

    @contextlib.contextmanager
    def noting_output_of(self, example: int) -> Iterator[list[Tensor]]:
        """The list is given that example's row, (1, …), of what the first batch inside puts out."""
        noted: list[Tensor] = []
        self._noting = example, noted
        try:
            yield noted
        finally:
            self._noting = None

    def _note(self, outputs: Tensor) -> None:
        if self._noting is not None and not self._noting[1]:
            example, noted = self._noting
            noted.append(outputs.detach()[example : example + 1].clone())

    @contextlib.contextmanager
    def counted_if_done(self) -> Iterator[None]:
        """The examples of passes inside do not count where an error ends them."""
        before = self.counts
        try:
            yield
        except BaseException:
            self.counts = before
            raise

    def _scaled(self, batch: ExampleBatch) -> Iterator[Tensor]:
        stream = self._of_user(batch) if self._plan.log_likelihood else self._of_model(batch)
        for objective in stream:
            yield objective * self._plan.scale

    def _of_user(self, batch: ExampleBatch) -> Iterator[Tensor]:
        assert self._plan.log_likelihood is not None
        values = self._plan.log_likelihood(self._model, copy.copy(batch.inputs))
        _check_values(values, batch)
        kept = _kept(batch, values.device)
        number = len(batch) - batch.padding
        self.counts += Counts(number, number)
        self.fisher_type = "batched" if self._plan.fisher_type == "batched" else "empirical"
        with unseen():
            self._note(values)
        values = torch.where(kept, values, values.detach()) if batch.padding else values
        yield _finite(values.sum(), batch)

    def _of_model(self, batch: ExampleBatch) -> Iterator[Tensor]:
        distribution = self._distribution(batch)
        _check_number(distribution, batch)
        kept = _kept(batch, distribution.labelled.device)
        if batch.padding:
            distribution = distribution.without(~kept)
        with unseen():
            self._note(distribution.graph_output())
            number = int((distribution.labelled & kept).sum())
            self.counts += counted(distribution, number)
            self.fisher_type = self._settled_type(distribution)
        objective = None
        for objective in _unseen(self._expectation(distribution, batch.ids)):
            yield _finite(objective, batch)
        if objective is None and self._never_none:
            yield distribution.graph_output().sum() * 0.0

    def _settled_type(self, distribution: Distribution) -> str:
        """By the very first example, so that it does not depend on the size of the batches."""
        if self.fisher_type == "exact":
            _refuse_endless(distribution.num_exact_passes)
        if self.fisher_type != "auto":
            return self.fisher_type
        few = distribution.first_example().num_exact_passes <= MAX_EXACT_PASSES
        return "exact" if few else "sampled"

    def _expectation(self, distribution: Distribution, ids: Sequence[int]) -> Iterator[Tensor]:
        if self.fisher_type == "exact":
            yield from distribution.exact(self._choices(ids))
        elif self.fisher_type == "sampled":
            for draw in range(self._plan.num_draws):
                yield distribution.sampled(self._choices(ids, draw)) / self._plan.num_draws**0.5
        else:
            yield distribution.empirical()

    def _choices(self, ids: Sequence[int], draw: int = 0) -> Choices:
        def numbers(count: int, n: int) -> Tensor:
            return uniforms(self._plan.seed, ids[n], draw, count)

        return Choices(numbers, ids, self._decided, place=(draw,))


def _unseen(stream: Iterator[Tensor]) -> Iterator[Tensor]:
    """Each objective made without an interception of what it takes."""
    while True:
        with unseen():
            objective = next(stream, None)
        if objective is None:
            return
        yield objective


def _kept(batch: ExampleBatch, device: torch.device) -> Tensor:
    return torch.arange(len(batch), device=device) < len(batch) - batch.padding


def _refuse_endless(passes: int) -> None:
    """Of an expectation that would take days; what cannot be enumerated at all says so itself."""
    if _TOO_MANY_PASSES < passes < sys.maxsize:
        raise ValueError(
            f"fisher_type='exact' would take {passes:,} backward passes for one example, one for "
            "each further class of each labelled position, as over a vocabulary; allowed are "
            f"{_TOO_MANY_PASSES:,}. Use 'sampled', which draws the labels from the model and takes "
            "one pass, 'empirical' or 'auto'."
        )


def _finite(objective: Tensor, batch: ExampleBatch) -> Tensor:
    if not torch.isfinite(objective):
        raise ValueError(
            f"The log-likelihood is {objective.item()} on the batch of examples {batch.ids}; the "
            "Fisher needs finite outputs. Look for NaN in the weights or in these examples."
        )
    return objective


def _check_number(distribution: Distribution, batch: ExampleBatch) -> None:
    if len(distribution.labelled) != len(batch):
        raise ValueError(
            f"The model's outputs are of {len(distribution.labelled)} examples on a batch of "
            f"{len(batch)}: {batch.ids[:8]}. Examples have to lie along their first axis, and that "
            "of the labels; a data_collator that puts them there helps."
        )


def _check_values(values: Any, batch: ExampleBatch) -> None:
    if not isinstance(values, Tensor):
        raise ValueError(
            f"log_likelihood returned a {type(values).__name__}; it must return a tensor with log "
            "p(y|x) of each example, shape (batch,)."
        )
    if values.shape != (len(batch),):
        raise ValueError(
            f"log_likelihood returned shape {tuple(values.shape)} for {len(batch)} examples; it "
            "must return log p(y|x) of each, shape (batch,)."
        )
    if torch.is_grad_enabled() and not values.requires_grad:
        raise ValueError(
            f"log_likelihood returned numbers ({values.dtype}) that no gradient leads back from, "
            "with which nothing would be protected; it must return log p(y|x) as computed from the "
            "model's outputs, without torch.no_grad, detach, item or argmax."
        )
