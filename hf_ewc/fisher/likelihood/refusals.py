"""Why a likelihood is not known, and what to do: the errors of `LabelReader`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_ewc.fisher.labels import IGNORED, USE_LOG_LIKELIHOOD, label_name
from hf_ewc.fisher.likelihood.left_out import label_left_out
from hf_ewc.fisher.likelihood.own_loss import Observation
from hf_ewc.fisher.likelihood.readings import Reading

_PROBLEM_TYPES = (
    "model.config.problem_type to 'single_label_classification' (a softmax over classes), "
    "'multi_label_classification' (yes or no for each label) or 'regression'"
)


# Of labels to which no output gives a probability.
_IMPOSSIBLE = (
    "says that they have the probability 0, as label sequences of CTC do that have more labels, "
    "and blanks between equal ones, than there are frames. Leave such examples out of the data. "
    "With model.config.ctc_zero_infinity=True they do not count in the loss, and fisher_type="
    "'sampled' takes them, whose labels are drawn."
)


def no_logits(values: Any) -> ValueError:
    names = list(values) if isinstance(values, Mapping) else [type(values).__name__]
    if any("top_log_probs" in str(name) for name in names):
        return ValueError(
            "This head answers questions by a beam: the end is scored for the likeliest starts "
            "alone, so that its outputs give no probability to every answer. Use a head with "
            f"start_logits and end_logits, such as ...ForQuestionAnsweringSimple, or "
            f"{USE_LOG_LIKELIHOOD}."
        )
    own = values.get("logits") if isinstance(values, Mapping) else None
    if own is not None:
        return ValueError(
            f"The model's 'logits' are a {type(own).__name__}, of several heads perhaps; needed is "
            f"one tensor. Return one, or {USE_LOG_LIKELIHOOD}."
        )
    return ValueError(
        f"The model returns no 'logits' (it returns {', '.join(map(str, names))}); "
        f"{USE_LOG_LIKELIHOOD}."
    )


def several_scores(scores: Sequence[Tensor]) -> ValueError:
    return ValueError(
        f"The model returns a tuple of tensors and no loss; {len(scores)} of these may be the "
        f"logits of the labels ({'; '.join(map(_form, scores))}), such as features beside them. "
        f"Return a dict with 'logits' and, best, the 'loss'; or {USE_LOG_LIKELIHOOD}."
    )


def no_head(logits: Tensor, labels: Tensor) -> ValueError:
    return ValueError(
        f"Logits of {_form(logits)} and labels of {_form(labels)} are no head that is known here; "
        f"{USE_LOG_LIKELIHOOD}."
    )


def unclear(logits: Tensor, labels: Tensor) -> ValueError:
    return ValueError(
        f"Labels of {_form(labels)} for outputs of {_form(logits)} may mean regression or several "
        "labels at once, or shares of classes, and the model has no loss that says which. Set "
        f"{_PROBLEM_TYPES}, or {USE_LOG_LIKELIHOOD}."
    )


def soft_labels(labels: Tensor) -> ValueError:
    return ValueError(
        f"The labels of {_form(labels)} are shares that sum to 1 in each row, as those of mixed "
        "examples are, while the model's own loss takes each class for yes or no by itself, as "
        f"transformers does where nothing is said. Set {_PROBLEM_TYPES}, or {USE_LOG_LIKELIHOOD}."
    )


def no_shares(labels: Tensor) -> ValueError:
    return ValueError(
        f"The labels of {_form(labels)} have a number for each class which do not sum to 1 in each "
        "row, so that they are no shares of the classes, and the model's own loss does not say "
        f"what they are. Set {_PROBLEM_TYPES}, or {USE_LOG_LIKELIHOOD}."
    )


def probabilities() -> ValueError:
    return ValueError(
        "The model's 'logits' are probabilities, not negative and 1 in sum: a softmax of them is "
        f"not what it predicts. Return the values before the softmax, or {USE_LOG_LIKELIHOOD}."
    )


def axis_unknown(logits: Tensor) -> ValueError:
    return ValueError(
        f"Logits of {_form(logits)} have as many classes as positions, and the model has no loss "
        "that says which axis is which. Give batches of another length, let its forward take "
        f"labels and return a loss, or {USE_LOG_LIKELIHOOD}."
    )


def scores_of_labels(model: nn.Module) -> ValueError:
    return ValueError(
        f"The logits of {type(model).__name__} depend on the labels that it is given, as where a "
        "margin is taken from the true class (CosFace, ArcFace): such logits are no distribution "
        "of labels. Estimate with a forward that leaves the margin out in eval mode, or "
        f"{USE_LOG_LIKELIHOOD}."
    )


def changing_scores(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} puts out other logits when it is called again on the same inputs "
        "in eval mode, as where dropout or noise stays on or a forward updates buffers that it "
        "uses: no one function of the inputs, whose Fisher this would be. Have its forward leave "
        "that out where self.training is False."
    )


def shift_unknown(model: nn.Module) -> ValueError:
    return ValueError(
        f"The loss of {type(model).__name__} is the same whether labels are shifted by one or not, "
        "as where all outputs are equal, so that the likelihood is not known here. Estimate after "
        f"some training, or {USE_LOG_LIKELIHOOD}."
    )


def labels_are_inputs(model: nn.Module) -> ValueError:
    return ValueError(
        f"The labels are the input_ids themselves, and {type(model).__name__} has no loss that "
        "says whether each position predicts its own label or, as language models do, the next "
        "one. Let its forward take labels and return a loss, consolidate with the trainer whose "
        "compute_loss has it, shift the labels yourself (−100 at the last position), or "
        f"{USE_LOG_LIKELIHOOD}."
    )


def other_loss(
    model: nn.Module, observed: Sequence[Observation], candidates: Sequence[Reading]
) -> ValueError:
    """The model's loss is −log p of none of the `candidates`."""
    first = observed[0]
    labels = first.batch[label_name(first.batch) or "start_positions"]
    found = f"The loss of {type(model).__name__}, {first.loss:.4g} for labels of {_form(labels)}, "
    if math.isinf(first.loss):
        return ValueError(found + _IMPOSSIBLE)
    left_out = label_left_out(observed, candidates)
    if left_out is not None:
        return ValueError(found + _other_ignore_index(model, left_out))
    tried = [f"{c.meaning} ({_stated(c, first)})" for c in candidates]
    set_type = f"Set {_PROBLEM_TYPES} where the loss follows it, or " if _has_config(model) else ""
    what_to_do = f"{set_type}{USE_LOG_LIKELIHOOD}."
    return ValueError(
        f"{found}is not the cross-entropy of its logits, nor −log p of any likelihood that is "
        f"known here: {', '.join(tried)}. So it is with weights of classes or tokens, label "
        "smoothing, margins or a softmax inside the model, and with heads that return something "
        f"else as logits. {what_to_do[0].upper()}{what_to_do[1:]}"
    )


def _other_ignore_index(model: nn.Module, left_out: int) -> str:
    settings = vars(model.config) if _has_config(model) else {}
    set_there = "".join(
        f", model.config.{name} = {IGNORED}"
        for name, value in settings.items()
        if "ignore" in name and value == left_out
    )
    return (
        f"is not the cross-entropy of its logits but that without the labels {left_out}: its "
        f"ignore_index is {left_out}. Labels that are left out are {IGNORED} here, so that "
        f"{left_out} would count. Put {IGNORED} in its place in the data, and ignore_index="
        f"{IGNORED} in the loss{set_there}; or {USE_LOG_LIKELIHOOD}."
    )


def _has_config(model: nn.Module) -> bool:
    return hasattr(model, "config")


def other_stated_loss(model: nn.Module, first: Observation, candidates: Sequence[Reading]) -> str:
    """A warning: the loss that a model is trained with is −log p of none of the `candidates`."""
    tried = ", ".join(f"{c.meaning} ({_stated(c, first)})" for c in candidates)
    return (
        f"The trainer's own loss, {first.loss:.4g} on a few examples, is not −log p of what "
        f"{type(model).__name__} returns for them in any way that is known here: {tried}. So it is "
        "with weights, label smoothing and further terms, which change nothing of what the Fisher "
        "is of, and with inputs or outputs that the loss changes, which do. Then pass "
        "log_likelihood= a function of (model, batch) that returns log p(y|x) of each example, "
        "shape (batch,)."
    )


def padding_counts(model: nn.Module) -> str:
    """A warning: what an example comes to depends on how long the others of its batch are."""
    return (
        f"{type(model).__name__} returns other logits for a text with padding before it than for "
        "the text alone, as where positions are counted from the first place: the Fisher depends "
        "on which texts share a batch. Pad on the right (padding_side='right'), hand over "
        "position_ids, or use batch_size=1 (fisher_batch_size=1)."
    )


def further_stated_loss(model: nn.Module, kept_back: Sequence[str]) -> str:
    """A warning: a loss has a term beside −log p of the labels, and inputs of its own."""
    return (
        "The trainer's own loss has a further term beside −log p of the labels, and takes "
        f"{', '.join(kept_back)}, which {type(model).__name__} does not get. The Fisher is of the "
        "labels alone: where the term is the loss of a further head or of other labels, what only "
        "it trains would not be protected. Then pass log_likelihood= a function of (model, batch) "
        "that returns log p(y|x) of each example, shape (batch,)."
    )


@torch.no_grad()
def _stated(reading: Reading, observed: Observation) -> str:
    try:
        return f"{float(reading.read(observed.outputs, observed.batch).losses()[0]):.4g}"
    except (ValueError, RuntimeError):
        return "does not fit"


def _form(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} and dtype {str(tensor.dtype).removeprefix('torch.')}"


def changed_loss(
    model: nn.Module, observed: Sequence[Observation], candidates: Sequence[Reading], news: str
) -> ValueError:
    """A later batch, with something that those before had not, is read otherwise by the loss."""
    return ValueError(
        f"The first batches were read by the model's loss; of one with {news}, which these had "
        f"not, that loss says something else. {other_loss(model, observed, candidates)}"
    )
