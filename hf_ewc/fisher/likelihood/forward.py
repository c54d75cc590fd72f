"""How a model is run for its outputs, without its labels or, where these matter, with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_ewc.fisher.labels import IGNORED, LABEL_NAMES, Batch, label_name
from hf_ewc.fisher.likelihood.auxiliary_terms import without_auxiliary_terms
from hf_ewc.fisher.likelihood.slices import close, unseen
from hf_ewc.fisher.memory import is_out_of_memory


@dataclass(frozen=True)
class CTCCall:
    """What a model gave to `ctc_loss`: see `Alignments`."""

    log_probabilities: Tensor
    frames: Tensor
    labels: Tensor
    blank: int


@dataclass(frozen=True)
class Outputs:
    """Of one forward.

    Args:
        values: what the model returned.
        ctc: what it gave to `ctc_loss`, None where it did not call it.
    """

    values: Any
    ctc: CTCCall | None = None

    @property
    def loss(self) -> Tensor | None:
        """By name or, in a tuple, by place."""
        if isinstance(self.values, Mapping):
            return self.values.get("loss")
        if isinstance(self.values, (tuple, list)) and len(self.values) > 1:
            first, second = self.values[:2]
            if isinstance(first, Tensor) and first.dim() == 0 and isinstance(second, Tensor):
                return first
        return None

    @property
    def logits(self) -> Tensor | None:
        if isinstance(self.values, Tensor):
            return self.values
        if isinstance(self.values, Mapping):
            named = self.named("logits")
            return self.named("prediction_logits") if named is None else named
        if isinstance(self.values, (tuple, list)) and self.values:
            found = self.values[0 if self.loss is None else 1]
            return found if isinstance(found, Tensor) else None
        return None

    @property
    def in_a_row(self) -> list[Tensor]:
        """The floating tensors of a tuple without a loss, which are not told apart by names."""
        if not isinstance(self.values, (tuple, list)) or self.loss is not None:
            return []
        return [v for v in self.values if isinstance(v, Tensor) and v.is_floating_point()]

    def named(self, name: str) -> Tensor | None:
        found = self.values.get(name) if isinstance(self.values, Mapping) else None
        return found if isinstance(found, Tensor) else None

    @property
    def scores(self) -> list[Tensor]:
        """What says whether two forwards did the same."""
        found = (self.logits, self.named("start_logits"), self.named("end_logits"))
        return [scores for scores in found if scores is not None]

    def of_examples(self, rows: list[int]) -> Outputs:
        """The scores of some examples alone."""
        names = ("logits", "prediction_logits", "start_logits", "end_logits")
        if not isinstance(self.values, Mapping):
            logits = self.logits
            return Outputs(None if logits is None else logits[rows])
        chosen = {n: v[rows] for n in names if (v := self.named(n)) is not None}
        return Outputs(chosen)


class Forward:
    """Runs a model on a batch for its outputs.

    Labels are left out, since the loss is not needed. Encoder-decoders make the decoder's inputs of
    them: `follow` finds out how, by what reproduces the outputs of the forward that got labels.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        get_base_model = getattr(model, "get_base_model", None)  # of a PEFT model
        base = get_base_model() if callable(get_base_model) else model
        self._parameters = inspect.signature(base.forward).parameters
        self._way: str | None = None

    def __call__(self, batch: Batch) -> Outputs:
        if self._required("labels"):
            return self.with_labels(batch)
        unsettled = "prepared" if self._can_prepare(batch) else "without"
        return self._run(self._way or unsettled, batch)

    def with_labels(self, batch: Batch) -> Outputs:
        """The outputs of the forward that gets the labels, and what it gave to `ctc_loss`.

        Its loss is that of the labels alone, without what a second head or a router adds.
        """
        inputs = _without_labels(batch)
        for side in ("start_positions", "end_positions"):
            if side in batch:
                inputs[side] = batch[side]
        name = label_name(batch)
        if name is not None:
            labels = batch[name]
            place = "labels" if self._takes("labels") else name
            inputs[place] = labels if labels.is_floating_point() else labels.long()
        with _CTCCalls() as calls, without_auxiliary_terms(self._model):
            values = self._model(**inputs)
        return Outputs(_named(values, batch), calls.last)

    def takes_labels(self, batch: Batch) -> bool:
        """Whether the model's forward has a place for the labels of a batch."""
        name = label_name(batch)
        if name is None:
            return self._takes("start_positions")
        return self._takes("labels") or name in self._parameters

    def names(self, name: str) -> bool:
        """Whether the forward's signature has an argument of that name."""
        return name in self._parameters

    def follow(self, batch: Batch, labelled: Outputs) -> None:
        """Run the model from now on in the first way that does what the labelled forward did."""
        for way in ("prepared", "without"):
            if way == "prepared" and not self._can_prepare(batch):
                continue
            if self._reproduces(way, batch, labelled):
                self._way = way
                return
        self._way = "with"

    @property
    def takes_labels_always(self) -> bool:
        return self._way == "with"

    def can_leave_out(self, batch: Batch) -> bool:
        """Whether the forward may be run without labels, and makes no inputs of them."""
        return not self._required("labels") and not self.makes_decoder_inputs(batch)

    def always_with_labels(self) -> None:
        self._way = "with"

    def makes_decoder_inputs(self, batch: Batch) -> bool:
        """Whether the labels may become the inputs of a decoder."""
        config = getattr(self._model, "config", None)
        takes_ids = "decoder_input_ids" in self._parameters or hasattr(
            self._model, "prepare_decoder_input_ids_from_labels"
        )
        given = "decoder_input_ids" in batch or "labels" not in batch
        return bool(getattr(config, "is_encoder_decoder", False)) and takes_ids and not given

    def _can_prepare(self, batch: Batch) -> bool:
        prepares = hasattr(self._model, "prepare_decoder_input_ids_from_labels")
        return self.makes_decoder_inputs(batch) and prepares

    def _run(self, way: str, batch: Batch) -> Outputs:
        if way == "with":
            return self.with_labels(batch)
        inputs = _without_labels(batch)
        if way == "prepared":
            prepare: Any = self._model.prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = prepare(labels=batch["labels"])
        return Outputs(_named(self._model(**inputs), batch))

    def _reproduces(self, way: str, batch: Batch, labelled: Outputs) -> bool:
        try:
            found = self._run(way, batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        return same_scores(found, labelled)

    def _takes(self, name: str) -> bool:
        kinds = {parameter.kind for parameter in self._parameters.values()}
        return name in self._parameters or inspect.Parameter.VAR_KEYWORD in kinds

    def _required(self, name: str) -> bool:
        parameter = self._parameters.get(name)
        return parameter is not None and parameter.default is inspect.Parameter.empty


def same_scores(one: Outputs, other: Outputs) -> bool:
    """Whether two forwards came to the same, rounding and what is infinite apart."""
    pairs = list(zip(one.scores, other.scores, strict=False))
    with torch.no_grad(), unseen():
        return bool(pairs) and all(close(a.detach(), b.detach()) for a, b in pairs)


def _named(values: Any, batch: Batch) -> Any:
    """The outputs of a head that answers questions by name, also where they come as a tuple."""
    if not isinstance(values, (tuple, list)) or label_name(batch) is not None:
        return values
    if "start_positions" not in batch or not all(isinstance(v, Tensor) for v in values[:1]):
        return values
    loss = {"loss": values[0]} if values and values[0].dim() == 0 else {}
    sides = values[len(loss) : len(loss) + 2]
    if len(sides) < 2 or not all(isinstance(v, Tensor) and v.is_floating_point() for v in sides):
        return values
    start, end = sides
    if start.dim() != 2 or start.shape != end.shape:
        return values
    return {**loss, "start_logits": start, "end_logits": end}


def _without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in LABEL_NAMES}


class _CTCCalls(TorchFunctionMode):
    """Listens to `ctc_loss`: how many frames count, and which class is the blank."""

    def __init__(self) -> None:
        super().__init__()
        self.last: CTCCall | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.ctc_loss:
            bound = inspect.signature(nn.functional.ctc_loss).bind(*args, **kwargs)
            bound.apply_defaults()
            self.last = _ctc_call(bound.arguments)
        return func(*args, **kwargs)


def _ctc_call(given: Mapping[str, Any]) -> CTCCall:
    log_p: Tensor = given["log_probs"]
    frames, lengths = (
        torch.as_tensor(given[name], device=log_p.device)
        for name in ("input_lengths", "target_lengths")
    )
    targets: Tensor = given["targets"]
    rows = targets.split(lengths.tolist()) if targets.dim() == 1 else targets
    labels = torch.full((len(lengths), int(lengths.max())), IGNORED, device=log_p.device)
    for row, own, length in zip(labels, _each(rows), lengths.tolist(), strict=True):
        row[:length] = own[:length]
    return CTCCall(log_p.transpose(0, 1), frames, labels, int(given["blank"]))


def _each(rows: Any) -> Iterator[Tensor]:
    yield from rows
