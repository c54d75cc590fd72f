"""From a model and a batch to the distribution of its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.labels import IGNORED, Batch, label_name, refuse_further_labels
from hf_ewc.fisher.likelihood import choosing, refusals
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.fisher.likelihood.forward import Forward, Outputs, same_scores
from hf_ewc.fisher.likelihood.label_shift import shifts_labels
from hf_ewc.fisher.likelihood.observing import Observer, few_examples, few_positions, has_labels
from hf_ewc.fisher.likelihood.own_loss import Observation
from hf_ewc.fisher.likelihood.readings import Reading
from hf_ewc.fisher.likelihood.slices import unseen

# The true labels and made-up ones; the further ones where these tell nothing.
_TURNS, _FURTHER_TURNS = range(2), range(2, 5)


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
        self._reading: Reading | None = None
        self._loss_is_nan = False
        self._expected: tuple[Batch, list[int] | None, Observation] | None = None

    def settle(self, batch: ExampleBatch) -> None:
        """Find by the model's own loss what its outputs mean, unless that is known already.

        It takes two to five forwards of two examples, of long texts a part, without gradients; none
        later on.

        Raises:
            ValueError: the batch has labels for further heads, or the loss is of no likelihood that
                is known here.
        """
        inputs = batch.inputs
        refuse_further_labels(inputs)
        if self._reading is None and has_labels(inputs) and self._forward.takes_labels(inputs):
            for rows, few in self._to_observe(batch):
                observer = Observer(self._forward, few)
                observed = observer.observe(_TURNS)
                if observed:
                    self._follow(inputs, rows, observed)
                    self._settle_by(observer, observed)
                    break

    def _to_observe(self, batch: ExampleBatch) -> Iterator[tuple[list[int] | None, Batch]]:
        """As little of a batch as tells, then more; with the places of the examples in it."""
        rows, few = few_examples(batch)
        short = few_positions(few) if shifts_labels(self._model) else None
        if short is not None:
            yield None, short
        yield rows, few
        yield None, batch.inputs

    def distribution(self, batch: Batch) -> Distribution:
        """p(y | x) of a batch, with a graph.

        Raises:
            ValueError: the batch has no labels, or the outputs are of no head that is known.
        """
        refuse_further_labels(batch)
        outputs = self._run(batch)
        batch = self._after_prompt(batch, outputs, known=self._reading is not None)
        reading = self._reading
        if reading is None:
            said = self._problem_type
            reading = choosing.by_what_is_said(self._model, said, outputs, batch)
            if has_labels(batch) and not self._loss_is_nan:
                self._reading = reading
        return reading.read(outputs, batch)

    def _run(self, batch: Batch) -> Outputs:
        """The outputs; with labels, where the forward without them does something else."""
        outputs = self._forward(batch)
        if self._expected is not None:
            observed, rows, expected = self._expected
            if batch is not observed or rows is None:
                with torch.no_grad():
                    own = self._forward(expected.batch)
            else:
                with torch.no_grad(), unseen():
                    own = outputs.of_examples(rows)
            self._expected = None  # not before: memory may have run out
            if not same_scores(own, expected.outputs):
                self._forward.always_with_labels()
                outputs = self._forward(batch)
        return outputs

    def _follow(
        self, batch: Batch, rows: list[int] | None, observed: Sequence[Observation]
    ) -> None:
        """Have the forward do what it does with labels; of decoders this is seen at once."""
        last = observed[-1]
        if self._forward.makes_decoder_inputs(last.batch):
            self._forward.follow(last.batch, last.outputs)
        elif observed[0].outputs.scores:
            self._expected = batch, rows, observed[0]

    def _settle_by(self, observer: Observer, observed: list[Observation]) -> None:
        first = observed[0]
        self._loss_is_nan = first.outputs.loss is not None and math.isnan(first.loss)
        observed = self._after_prompts(observed)
        candidates = choosing.candidates_for(observed[0].outputs, observed[0].batch)
        if not candidates or math.isnan(first.loss):
            return
        reading = choosing.by_its_loss(self._model, candidates, observed)
        if reading is None:
            observed += self._after_prompts(observer.observe(_FURTHER_TURNS))
            reading = choosing.by_its_loss(self._model, candidates, observed)
        if reading is None:
            raise refusals.other_loss(self._model, observed[0], candidates)
        if self._problem_type is None:
            choosing.refuse_unclear_shares(self._model, reading, first.batch)
        if reading.needs_labelled_forward:
            self._forward.always_with_labels()
        self._reading = reading

    def _after_prompts(self, observed: Sequence[Observation]) -> list[Observation]:
        return [
            replace(o, batch=self._after_prompt(o.batch, o.outputs, known=True)) for o in observed
        ]

    def _after_prompt(self, batch: Batch, outputs: Outputs, *, known: bool) -> Batch:
        """With labels for what stands before a text: none.

        An adapter's virtual tokens do, and in some models an image; of these it is not `known` but
        by the loss.
        """
        config = getattr(self._model, "active_peft_config", None)
        virtual = getattr(config, "num_virtual_tokens", 0)
        name, logits = label_name(batch), outputs.logits
        if name is None or logits is None or logits.dim() != 3:
            return batch
        labels = batch[name]
        if labels.dim() != 2 or labels.is_floating_point():
            return batch
        before = logits.shape[1] - labels.shape[1]
        if before <= 0 or (before != virtual and not known):
            return batch
        return {**batch, name: torch.nn.functional.pad(labels, (before, 0), value=IGNORED)}
