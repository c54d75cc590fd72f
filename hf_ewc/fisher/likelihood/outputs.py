"""From a model and a batch to the distribution of its labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForTokenClassification,
)

from hf_ewc.fisher.labels import IGNORED, LABEL_NAMES, Batch, labels_in, refuse_further_labels
from hf_ewc.fisher.likelihood.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Gaussian,
    Joint,
)


class LabelReader:
    """Runs a model on a batch without its labels and reads p(y | x) off the outputs.

    Single-label, multi-label and regression heads are told apart as the model's own loss does it
    (`config.problem_type`, else the number of labels and their dtype). Whether the labels of a
    language model are shifted by one is found by comparing with the loss that the model itself
    computes on the first batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = _forward_parameters(model)
        self._shifted: bool | None = None

    def distribution(self, batch: Batch) -> Distribution:
        """p(y | x) of a batch, with a graph.

        Raises:
            ValueError: the batch has no labels, the model returns no logits, or the two do not
                belong to a known kind of head.
        """
        refuse_further_labels(batch)
        if self._shifted is None:
            self._shifted = self._find_shift(batch)
        return self._read(self._model(**self._inputs(batch)), batch)

    def _inputs(self, batch: Batch) -> Batch:
        inputs = {name: value for name, value in batch.items() if name not in LABEL_NAMES}
        labels = batch.get("labels")
        if self._required("labels"):
            inputs["labels"] = labels
        elif self._encoder_decoder and "decoder_input_ids" not in batch and labels is not None:
            prepare = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:
                inputs["labels"] = labels
            else:
                inputs["decoder_input_ids"] = prepare(labels=labels)
        return inputs

    @property
    def _encoder_decoder(self) -> bool:
        config = getattr(self._model, "config", None)
        takes_ids = "decoder_input_ids" in self._parameters or hasattr(
            self._model, "prepare_decoder_input_ids_from_labels"
        )
        return bool(getattr(config, "is_encoder_decoder", False)) and takes_ids

    def _required(self, name: str) -> bool:
        parameter = self._parameters.get(name)
        return parameter is not None and parameter.default is inspect.Parameter.empty

    def _read(self, outputs: Any, batch: Batch) -> Distribution:
        if isinstance(outputs, Mapping) and {"start_logits", "end_logits"} <= outputs.keys():
            return Joint([_position(outputs, batch, side) for side in ("start", "end")])
        logits = _logits(outputs)
        labels = self._after_prompt(labels_in(batch), logits)
        if self._is_categorical(logits, labels):
            return self._categorical(logits, labels)
        if labels.shape != logits.shape:
            labels = labels.reshape(logits.shape)
        if self._problem_type(logits, labels) == "regression":
            return Gaussian(logits.flatten(1), labels.flatten(1))
        return Bernoulli(logits.flatten(1), labels.flatten(1))

    def _after_prompt(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels of a language model whose adapter puts virtual tokens in front of the text."""
        config = getattr(self._model, "active_peft_config", None)
        virtual = getattr(config, "num_virtual_tokens", 0)
        if virtual and labels.dim() == 2 and logits.dim() == 3:
            missing = logits.shape[1] - labels.shape[1]
            if missing == virtual:
                return torch.nn.functional.pad(labels, (missing, 0), value=IGNORED)
        return labels

    def _is_categorical(self, logits: Tensor, labels: Tensor) -> bool:
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            if labels.numel() == logits.numel() and logits.dim() >= 1:
                return self._problem_type(logits, labels) == "single_label_classification"
            if labels.numel() == logits[..., 0].numel() and not labels.is_floating_point():
                return True
            raise ValueError(
                f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} "
                f"and dtype {labels.dtype} are no head that is known here; pass log_likelihood="
                "a function of (model, batch) that returns log p(y|x) of each example."
            )
        return self._problem_type(logits, labels) == "single_label_classification"

    def _problem_type(self, logits: Tensor, labels: Tensor) -> str:
        config = getattr(self._model, "config", None)
        configured = getattr(config, "problem_type", None)
        if configured is not None and logits.dim() == 2:
            return str(configured)
        if logits.dim() == 2 and logits.shape[-1] == 1:
            return "regression"
        if not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
            return "single_label_classification"
        if config is not None and labels.is_floating_point() and logits.shape == labels.shape:
            return "multi_label_classification"
        raise ValueError(
            f"Labels of dtype {labels.dtype} and shape {tuple(labels.shape)} for outputs of shape "
            f"{tuple(logits.shape)} may mean regression or several labels at once; set "
            "model.config.problem_type, or pass log_likelihood=."
        )

    def _categorical(self, logits: Tensor, labels: Tensor) -> Categorical:
        labels = labels.reshape(logits.shape[:-1]).long()
        if self._shifted:
            labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        examples = logits.shape[0]
        logits = logits.reshape(examples, -1, logits.shape[-1])
        labels = labels.reshape(examples, -1)
        outside = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
        if outside.any():
            raise ValueError(
                f"Label {int(labels[outside][0])} is outside the {logits.shape[-1]} classes of the "
                f"model; labels must be 0 … {logits.shape[-1] - 1}, or {IGNORED} to be left out."
            )
        return Categorical(logits, labels)

    @torch.no_grad()
    def _find_shift(self, batch: Batch) -> bool | None:
        """Whether position t predicts label t + 1: what reproduces the model's own loss.

        None where no label says it. Without a loss of the model, its class decides.
        """
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
            return False
        config = getattr(self._model, "config", None)
        if getattr(config, "problem_type", None) in ("multi_label_classification", "regression"):
            return False
        if not self._accepts_labels:
            return False
        if not (labels != IGNORED).any():
            return None
        outputs = self._model(**{**self._inputs(batch), "labels": labels.long()})
        loss, logits = _loss_and_logits(outputs)
        if logits is None or logits.dim() < 3:
            return False
        labels = self._after_prompt(labels, logits)
        if labels.shape != logits.shape[:-1]:
            return False
        if loss is None:
            return bool(shifts_labels(self._model))
        if loss.isnan() and not (labels[..., 1:] != IGNORED).any():
            return True  # a mean over no positions: only the first has a label
        by_class = shifts_labels(self._model)
        errors = []
        for shifted in (False, True):
            self._shifted = shifted
            distribution = self._categorical(logits, labels)
            count = (distribution.labels != IGNORED).sum().clamp_min(1)
            errors.append(float((distribution.empirical() / count + loss).abs()))
        self._shifted = None
        fits = [torch.isfinite(loss) and error <= 0.01 * abs(float(loss)) for error in errors]
        if any(fits) and (by_class is None or not all(fits)):
            return errors[1] < errors[0]
        if by_class is None:
            raise ValueError(
                f"The loss of {type(self._model).__name__}, {float(loss):.4g}, is not the "
                "cross-entropy of its logits, with or without a shift by one, so that its "
                "likelihood is not known here; pass log_likelihood= a function of (model, batch) "
                "that returns log p(y|x) of each example."
            )
        return by_class

    @property
    def _accepts_labels(self) -> bool:
        kinds = {parameter.kind for parameter in self._parameters.values()}
        return "labels" in self._parameters or inspect.Parameter.VAR_KEYWORD in kinds


def shifts_labels(model: nn.Module) -> bool | None:
    """Whether a model's class predicts label t + 1 at position t, as causal language models do.

    None for a class whose loss is no cross-entropy at each position, or not known.
    """
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    if loss not in (ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification):
        return None
    config = getattr(model, "config", None)
    return loss is ForCausalLMLoss and not getattr(config, "is_encoder_decoder", False)


def _loss_and_logits(outputs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Of a forward with labels, by name or, in a tuple, by place."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss"), _logits(outputs)
    if isinstance(outputs, (tuple, list)) and len(outputs) > 1:
        first, second = outputs[:2]
        if isinstance(first, Tensor) and first.dim() == 0 and isinstance(second, Tensor):
            return first, second
    return None, outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    get_base_model = getattr(model, "get_base_model", None)  # of a PEFT model
    base = get_base_model() if callable(get_base_model) else model
    return inspect.signature(base.forward).parameters


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        for name in ("logits", "prediction_logits"):
            if isinstance(outputs.get(name), Tensor):
                logits: Tensor = outputs[name]
                return logits
        found = ", ".join(map(str, outputs))
    elif isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        first: Tensor = outputs[0]
        return first
    else:
        found = type(outputs).__name__
    raise ValueError(
        f"The model returns no 'logits' (it returns {found}); pass log_likelihood= a function of "
        "(model, batch) that returns log p(y|x) of each example, shape (batch,)."
    )


def _position(outputs: Mapping[str, Any], batch: Batch, side: str) -> Categorical:
    labels = batch.get(f"{side}_positions")
    if not isinstance(labels, Tensor):
        raise ValueError(f"The data has no '{side}_positions', the labels of question answering.")
    logits = outputs[f"{side}_logits"]
    labels = labels.reshape(-1, 1)
    labels = labels.masked_fill((labels < 0) | (labels >= logits.shape[-1]), IGNORED)
    return Categorical(logits.unsqueeze(1), labels)
