"""From a model and a batch to the distribution of its labels."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.labels import (
    IGNORED,
    Batch,
    further_labels,
    label_name,
    named_as_labels,
    several_heads,
)
from hf_ewc.fisher.likelihood import choosing, refusals
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.fisher.likelihood.forward import Forward, Outputs, same_scores
from hf_ewc.fisher.likelihood.label_shift import takes_any_length
from hf_ewc.fisher.likelihood.loss_inputs import another, read_by_loss_alone
from hf_ewc.fisher.likelihood.news import News
from hf_ewc.fisher.likelihood.observing import Observer, few_examples, few_positions, has_labels
from hf_ewc.fisher.likelihood.own_loss import Observation, StatedLoss
from hf_ewc.fisher.likelihood.padding import (
    begins_with_padding,
    most_padded,
    predicted_from_text,
)
from hf_ewc.fisher.likelihood.parts import Parts
from hf_ewc.fisher.likelihood.readings import Reading
from hf_ewc.fisher.likelihood.slices import unseen
from hf_ewc.fisher.memory import is_out_of_memory
from hf_ewc.fisher.unwatched import unwatched
from hf_ewc.processes import is_main_process

logger = logging.getLogger("hf_ewc")

# The true labels and made-up ones; the further ones where these tell nothing.
_TURNS, _FURTHER_TURNS = range(2), range(2, 5)
# So often the loss is looked at again for what a batch has that none had before.
_MOST_LOOKS = 16


class LabelReader:
    """Runs a model on batches and reads p(y | x) of their labels off the outputs.

    What the outputs mean is found on the first batch with labels: of all readings that their
    shapes admit (softmax, shifted by one or not, yes or no, regression, CTC, …) the one whose
    −log p is the model's own loss, up to a constant factor, for the true labels and for made-up
    ones. Where the model has no loss, `config.problem_type` and its class say it.

    Args:
        model: the unwrapped one.
        in_full: run each forward in full, as sharded parameters need it; otherwise a forward with
            other labels runs only what is new in it.
        stated: losses of another place than the model, which it is trained with: where they are
            −log p of a reading, that is it.
    """

    def __init__(
        self, model: nn.Module, *, in_full: bool = False, stated: Sequence[StatedLoss] = ()
    ) -> None:
        self._model = model
        self._forward = Forward(model)
        self._parts = Parts() if in_full else Parts.of(model)
        self._in_full = in_full
        self._waiting: ExampleBatch | None = None
        # As it is set before any forward: those of `transformers` write down what they take.
        self._inputs: set[str] = set()  # whose names say "label", and which are none
        self._problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        self._reading: Reading | None = None
        self._stated = stated
        self._told: Reading | None = None
        self._loss_is_nan = False
        self._expected: tuple[Batch, list[int], Observation] | None = None
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._news = News((pad,) if isinstance(pad, int) else ())
        self._observed: list[Observation] = []  # by which the reading was found
        self._looks = 0
        self._padding_is_known = False
        # Not where processes run in step, nor of a text model whose loss is the library's own.
        of_library = type(model).__module__.startswith(("transformers.", "peft."))
        self._may_look_again = not in_full and not (of_library and takes_any_length(model))

    def settle(self, batch: ExampleBatch) -> None:
        """Find by the model's own loss what its outputs mean, unless that is known already.

        A batch of plain labels waits for its own forward, whose outputs say it. Otherwise it takes
        a forward of two examples, of long texts a part, without gradients; none later on.

        Raises:
            ValueError: the batch has labels for further heads, or the loss is of no likelihood that
                is known here.
        """
        inputs = batch.inputs
        self._refuse_further_labels(inputs)
        self._listen()
        if self._reading is None and has_labels(inputs) and self._forward.takes_labels(inputs):
            if self._can_wait(batch):
                self._waiting = batch
                return
            self._settle_on_few(batch)
        if self._observed and self._may_look_again and has_labels(inputs):
            self._look_at_news(batch)

    def _refuse_further_labels(self, batch: Batch) -> None:
        names = [name for name in further_labels(batch) if name not in self._inputs]
        self._inputs |= {name for name in names if self._is_input(name, batch)}
        if found := [name for name in names if name not in self._inputs]:
            raise several_heads(found)

    def _is_input(self, name: str, batch: Batch) -> bool:
        """Whether the outputs depend on what has no name of labels, such as `label_mask`.

        What only the loss depends on may be a second head's labels.
        """
        value = batch[name]
        if named_as_labels(name) or not isinstance(value, Tensor):
            return False
        if not self._forward.names(name):
            return False
        try:
            with torch.no_grad(), unwatched():
                own, changed = self._forward(batch), self._forward({**batch, name: another(value)})
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        return not same_scores(changed, own)

    def _listen(self) -> None:
        """Find the reading that the stated losses tell, if there are any, and say if they do not.

        Where labels make the decoder's inputs, they are only held to what the model makes of these.
        """
        stated, self._stated = self._stated, ()
        if not stated:
            return
        decodes = any(self._forward.makes_decoder_inputs(each.batch) for each in stated)
        run = self._forward.with_labels if decodes else self._forward
        try:
            with torch.no_grad(), unwatched():
                observed = [each.beside(run(each.batch)) for each in stated]
        except Exception as error:
            if not decodes or is_out_of_memory(error):
                raise
            return
        observed = self._after_prompts(observed)
        candidates = choosing.candidates_for(observed[0].outputs, observed[0].batch)
        if not candidates or any(math.isnan(each.loss) for each in observed):
            return
        with contextlib.suppress(ValueError):  # a shift that nothing tells
            self._told = choosing.by_its_loss(self._model, candidates, observed)
        told = self._told
        kept_back = stated[0].kept_back
        if told is None and is_main_process():
            logger.warning("%s", refusals.other_stated_loss(self._model, observed[0], candidates))
        elif told is not None and kept_back and choosing.has_further_term(told, observed):
            logger.warning("%s", refusals.further_stated_loss(self._model, kept_back))
        if decodes:
            self._told = None
        if self._told is not None and self._told.needs_labelled_forward:
            self._forward.always_with_labels()

    def _can_wait(self, batch: ExampleBatch) -> bool:
        """Whether all examples have labels that no input is made of, of small outputs."""
        name = label_name(batch.inputs)
        if self._in_full or name is None or len(batch) < 2 or batch.padding:
            return False
        labels = batch.inputs[name]
        plain = labels.dim() <= 1 or labels.is_floating_point()
        apart = batch.uneven is None and not batch.doubtful
        return plain and apart and self._forward.can_leave_out(batch.inputs)

    def _settle_on_few(self, batch: ExampleBatch) -> None:
        for rows, few in self._to_observe(batch):
            observer = Observer(self._forward, few, self._parts)
            observed = observer.observe(_TURNS)
            if observed:
                self._follow(batch.inputs, rows, observed)
                self._settle_by(observed, observer)
                break
        self._parts.forget()

    def _settle_on(self, batch: ExampleBatch) -> Outputs:
        """The outputs of a batch, after these have said what they mean, or those of a few have."""
        with self._parts.noted():
            outputs = self._forward(batch.inputs)
        refusal: ValueError | None = None
        with unwatched():
            observer = Observer(self._forward, batch.inputs, self._parts, known=True)
            observed = observer.observe(_TURNS)
            if observed and same_scores(outputs, observed[0].outputs):
                try:
                    self._settle_by(observed)
                except ValueError as error:
                    refusal = error.with_traceback(None)  # which would hold the graph
            intact = self._parts.are_as_noted()
            self._parts.forget()
            if self._reading is None:
                self._settle_on_few(batch)
        if refusal is not None and self._loss_is_nan:  # of all labels that a loss leaves out
            raise refusal
        if self._forward.takes_labels_always or not intact:
            return self._forward(batch.inputs)
        return self._as_expected(batch.inputs, outputs)

    def _to_observe(self, batch: ExampleBatch) -> Iterator[tuple[list[int] | None, Batch]]:
        """As little of a batch as tells, then more; with the places of the examples in it."""
        rows, few = few_examples(batch)
        short = few_positions(few) if takes_any_length(self._model) else None
        if short is not None:
            yield None, short
        yield rows, few
        yield None, batch.inputs

    def distribution(self, batch: Batch, *, padded_here: bool = False) -> Distribution:
        """p(y | x) of a batch, with a graph.

        Args:
            padded_here: whether its texts have no padding alone; then what is predicted from it
                counts nothing.

        Raises:
            ValueError: the batch has no labels, or the outputs are of no head that is known.
        """
        self._refuse_further_labels(batch)
        outputs = self._run(batch)
        batch = self._after_prompt(batch, outputs, known=self._reading is not None)
        reading = self._reading
        if reading is None:
            said = self._problem_type
            by_what_is_said = choosing.by_what_is_said
            reading = self._told or by_what_is_said(self._model, said, outputs, batch)
            if has_labels(batch) and not self._loss_is_nan:
                self._reading = reading
        if reading.shifted and padded_here and begins_with_padding(batch):
            self._look_at_padding(batch, outputs)
            batch = predicted_from_text(batch)
        return reading.read(outputs, batch)

    def _look_at_padding(self, batch: Batch, outputs: Outputs) -> None:
        """Say once if padding before a text changes what the model returns for it."""
        if self._padding_is_known or self._in_full:
            return
        self._padding_is_known = True
        place, alone = most_padded(batch)
        if alone is None or outputs.logits is None:
            return
        try:
            with torch.no_grad(), unwatched():
                own = self._forward(alone)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return
        if own.logits is None:
            return
        among = outputs.logits[place : place + 1, -own.logits.shape[1] :].detach()
        if not same_scores(Outputs({"logits": among}), own):
            warnings.warn(refusals.padding_counts(self._model), stacklevel=2)

    def _run(self, batch: Batch) -> Outputs:
        """The outputs; with labels, where the forward without them does something else."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.inputs is batch:
            return self._settle_on(waiting)
        if waiting is not None:
            with unwatched():
                self._settle_on_few(waiting)
        return self._as_expected(batch, self._forward(batch))

    def _as_expected(self, batch: Batch, outputs: Outputs) -> Outputs:
        if self._expected is not None:
            observed, rows, expected = self._expected
            if batch is observed:
                with torch.no_grad(), unseen():
                    own = outputs.of_examples(rows)
            else:
                with torch.no_grad(), unwatched():
                    own = self._forward(expected.batch)
            self._expected = None  # not before: memory may have run out
            if not same_scores(own, expected.outputs):
                self._forward.always_with_labels()
                outputs = self._forward(batch)
        return outputs

    def _follow(
        self, batch: Batch, rows: list[int] | None, observed: Sequence[Observation]
    ) -> None:
        """Have the forward do what it does with labels; of rows of the batch it is seen later."""
        first, last = observed[0], observed[-1]
        if self._forward.makes_decoder_inputs(last.batch):
            with self._parts.repeated():
                self._forward.follow(last.batch, last.outputs)
        elif first.outputs.scores and rows is not None:
            self._expected = batch, rows, first
        elif first.outputs.scores:
            with torch.no_grad(), self._parts.repeated():
                own = self._forward(first.batch)
            if not same_scores(own, first.outputs):
                self._forward.always_with_labels()

    def _settle_by(self, observed: list[Observation], observer: Observer | None = None) -> None:
        """By what was observed and, where that tells nothing, by what more `observer` sees."""
        first = observed[0]
        self._loss_is_nan = first.outputs.loss is not None and math.isnan(first.loss)
        observed = self._after_prompts(observed)
        candidates = choosing.candidates_for(observed[0].outputs, observed[0].batch)
        if self._told is not None:
            self._reading = self._told
            return
        if not candidates or math.isnan(first.loss):
            return
        self._refuse_scores_of_labels(observed)
        reading = choosing.by_its_loss(self._model, candidates, observed)
        if reading is None and observer is not None:
            observed += self._after_prompts(observer.observe(_FURTHER_TURNS))
            reading = choosing.by_its_loss(self._model, candidates, observed)
        if reading is None:
            raise refusals.other_loss(self._model, observed, candidates)
        of_loss = read_by_loss_alone(self._forward, first.batch) if self._may_look_again else []
        if of_loss and choosing.has_further_term(reading, observed):
            raise several_heads(of_loss)
        self._news.watch(of_loss)
        if self._problem_type is None:
            choosing.refuse_unclear_shares(self._model, reading, first.batch)
        if reading.needs_labelled_forward:
            self._forward.always_with_labels()
        self._reading, self._observed = reading, observed
        for each in observed:
            self._news.note(each.batch)

    def _look_at_news(self, batch: ExampleBatch) -> None:
        """Hold the reading to the loss again where a batch has what none had before.

        A loss may leave it out: padding by the mask, an `ignore_index`, a code for missing labels.

        Raises:
            ValueError: of that the loss is something else.
        """
        news = self._news.of(batch) if self._looks < _MOST_LOOKS else None
        if news is None:
            return
        self._looks += 1
        self._news.note(batch.inputs)
        what, place = news
        with unwatched():
            observer = Observer(self._forward, _with_another(batch, place), Parts())
            observed = self._after_prompts(observer.observe(_TURNS))
        if not observed or not all(math.isfinite(each.loss) for each in observed):
            return
        candidates = choosing.candidates_for(observed[0].outputs, observed[0].batch)
        every = [*self._observed, *observed]
        known = [self._reading] if self._reading is not None else []
        for seen in (every, observed):
            if choosing.by_its_loss(self._model, known, seen) is not None:
                return
        reading = choosing.by_its_loss(self._model, candidates, every) if candidates else None
        if reading is None:
            raise refusals.changed_loss(self._model, observed, candidates, what)
        self._reading = reading

    def _refuse_scores_of_labels(self, observed: Sequence[Observation]) -> None:
        """Of heads whose outputs know the labels, but for decoders that have them as inputs."""
        first, last = observed[0], observed[-1]
        if len(observed) < 2 or self._forward.makes_decoder_inputs(last.batch):
            return
        if first.outputs.scores and not same_scores(first.outputs, last.outputs):
            with torch.no_grad(), unwatched():
                again = self._forward.with_labels(first.batch)
            if not same_scores(first.outputs, again):
                raise refusals.changing_scores(self._model)
            raise refusals.scores_of_labels(self._model)

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


def _with_another(batch: ExampleBatch, place: int) -> Batch:
    """An example and the one behind it; all where they may hang together."""
    if len(batch) == 1:
        return batch.at_least_two().inputs
    if batch.uneven is not None or batch.doubtful or not batch.divisible:
        return batch.inputs
    return batch.only(sorted({place, (place + 1) % len(batch)})).inputs
