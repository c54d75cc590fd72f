"""From a model and a batch to the distribution of its labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from hf_ewc.fisher.labels import (
    IGNORED,
    Batch,
    label_name,
    labels_in,
    refuse_further_labels,
)
from hf_ewc.fisher.likelihood import refusals
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.fisher.likelihood.forward import Forward, Outputs, same_scores
from hf_ewc.fisher.likelihood.label_shift import shifts_labels
from hf_ewc.fisher.likelihood.made_up_labels import sums_to_one
from hf_ewc.fisher.likelihood.observing import Observer, few_examples, has_labels
from hf_ewc.fisher.likelihood.own_loss import Observation, misfit, rounding
from hf_ewc.fisher.likelihood.readings import (
    ANSWER,
    REGRESSION,
    SOFTMAX,
    YES_NO,
    Reading,
    looks_binary,
    readings,
)

# The true labels and made-up ones; the further ones where these tell nothing.
_TURNS, _FURTHER_TURNS = range(2), range(2, 5)
# Readings fit equally well where the misfit of the best is not this much smaller.
_CLEARLY = 0.1


class LabelReader:
    """Runs a model on batches and reads p(y | x) of their labels off the outputs.

    What the outputs mean is found on the first batch with labels: of all readings that their
    shapes admit (softmax, shifted by one or not, yes or no, regression, CTC, …) the one whose
    −log p is the model's own loss, up to a constant factor, for the true labels and for made-up
    ones. Where the model has no loss, `config.problem_type` and its class say it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward = Forward(model)
        # As it is set before any forward: those of `transformers` write down what they take.
        self._problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        self._loss_is_nan = False
        self._reading: Reading | None = None
        self._expected: tuple[list[int], Outputs] | None = None

    def distribution(self, batch: Batch) -> Distribution:
        """p(y | x) of a batch, with a graph.

        Raises:
            ValueError: the batch has no labels, the model returns no logits, or no known likelihood
                is that of the model's own loss.
        """
        refuse_further_labels(batch)
        labelled = has_labels(batch)
        if self._reading is None and labelled:
            self._ask_the_loss(batch)
        outputs = self._run(batch)
        batch = self._after_prompt(batch, outputs)
        reading = self._reading or self._by_what_is_said(outputs, batch)
        if labelled and self._reading is None and not self._loss_is_nan:
            self._reading = reading
        return reading.read(outputs, batch)

    def _run(self, batch: Batch) -> Outputs:
        """The outputs; with labels, where the forward without them does something else."""
        outputs = self._forward(batch)
        if self._expected is not None:
            rows, expected = self._expected
            self._expected = None
            if not same_scores(outputs.of_examples(rows), expected):
                self._forward.always_with_labels()
                outputs = self._forward(batch)
        return outputs

    def _ask_the_loss(self, batch: Batch) -> None:
        """Settle the reading by the model's own loss, if it has one."""
        if not self._forward.takes_labels(batch):
            return
        rows, few = few_examples(batch)
        observer = Observer(self._forward, few)
        observed = observer.observe(_TURNS)
        if not observed:
            return
        self._follow(rows, observed)
        self._loss_is_nan = observed[0].outputs.loss is not None and math.isnan(observed[0].loss)
        candidates = self._candidates(observed[0].outputs, observed[0].batch)
        if not candidates or math.isnan(observed[0].loss):
            return
        observed = self._with_prompts(observed)
        self._reading = self._fitting(candidates, observed)
        if self._reading is None:
            observed += self._with_prompts(observer.observe(_FURTHER_TURNS))
            self._reading = self._fitting(candidates, observed)
        if self._reading is None:
            labels = batch[label_name(batch) or "start_positions"]
            raise refusals.other_loss(self._model, observed, labels, candidates)
        self._refuse_unclear(self._reading, few)
        if self._reading.needs_labelled_forward:
            self._forward.always_with_labels()

    def _follow(self, rows: list[int], observed: Sequence[Observation]) -> None:
        """Have the forward do what it does with labels; of decoders this is seen at once."""
        last = observed[-1]
        if self._forward.makes_decoder_inputs(last.batch):
            self._forward.follow(last.batch, last.outputs)
        elif observed[0].outputs.scores:
            self._expected = rows, observed[0].outputs

    def _candidates(self, outputs: Outputs, batch: Batch) -> list[Reading]:
        if outputs.named("start_logits") is not None and outputs.named("end_logits") is not None:
            return [ANSWER]
        if outputs.logits is None or label_name(batch) is None:
            return []
        batch = self._after_prompt(batch, outputs)
        return readings(outputs, batch)

    def _fitting(
        self, candidates: Sequence[Reading], observed: Sequence[Observation]
    ) -> Reading | None:
        """The reading whose −log p is the loss; None where there is none.

        Raises:
            ValueError: with and without a shift of the labels it is, and nothing else tells.
        """
        tolerance = rounding(observed)
        finite = [o for o in observed if math.isfinite(o.loss)]
        misfits = [(misfit(c.read, finite, tolerance), c) for c in candidates]
        best = min(error for error, _ in misfits)
        if best > tolerance:
            return None
        within = min(tolerance, max(best / _CLEARLY, torch.finfo(torch.float32).eps))
        fits = [candidate for error, candidate in misfits if error <= within]
        if len({candidate.shifted for candidate in fits}) > 1:
            shifted = shifts_labels(self._model)
            if shifted is None:
                raise refusals.shift_unknown(self._model)
            fits = [candidate for candidate in fits if candidate.shifted == shifted]
        return fits[0]

    def _refuse_unclear(self, reading: Reading, batch: Batch) -> None:
        """Mixed labels that a loss takes for yes or no because nobody has said what they are."""
        if reading.problem_type != YES_NO or self._problem_type is not None:
            return
        labels = labels_in(batch)
        shares = labels.is_floating_point() and sums_to_one(labels) and not looks_binary(labels)
        if shares and hasattr(self._model, "config"):
            raise refusals.soft_labels(labels)

    def _by_what_is_said(self, outputs: Outputs, batch: Batch) -> Reading:
        """The reading of a model without a loss: by `problem_type`, its class, and the shapes."""
        candidates = self._candidates(outputs, batch)
        if not candidates:
            logits = outputs.logits
            if logits is None or label_name(batch) is None:
                raise refusals.no_logits(outputs.values)
            raise refusals.no_head(logits, labels_in(batch))
        if candidates == [ANSWER]:
            return ANSWER
        logits, labels = outputs.logits, labels_in(batch)
        assert logits is not None
        kinds = {candidate.problem_type for candidate in candidates}
        kind = self._problem_type if self._problem_type in kinds else None
        if kind is None and len(kinds) == 1:
            (kind,) = kinds
        if kind is None and logits[..., 0].numel() == labels.numel() and not looks_binary(labels):
            kind = REGRESSION
        if kind is None:
            raise refusals.unclear(logits, labels)
        if kind == SOFTMAX and sums_to_one(logits):
            raise refusals.probabilities()
        shifted = bool(shifts_labels(self._model)) and has_labels(batch)
        fits = [c for c in candidates if c.problem_type == kind]
        return next((c for c in fits if c.shifted == shifted), fits[0])

    def _with_prompts(self, observed: Sequence[Observation]) -> list[Observation]:
        return [replace(o, batch=self._after_prompt(o.batch, o.outputs)) for o in observed]

    def _after_prompt(self, batch: Batch, outputs: Outputs) -> Batch:
        """With labels for the virtual tokens that an adapter puts before a text: none."""
        config = getattr(self._model, "active_peft_config", None)
        virtual = getattr(config, "num_virtual_tokens", 0)
        name, logits = label_name(batch), outputs.logits
        if not virtual or name is None or logits is None or logits.dim() != 3:
            return batch
        labels = batch[name]
        if labels.dim() != 2 or logits.shape[1] - labels.shape[1] != virtual:
            return batch
        return {**batch, name: torch.nn.functional.pad(labels, (virtual, 0), value=IGNORED)}
