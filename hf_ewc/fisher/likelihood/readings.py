"""The ways in which outputs and labels of given shapes may be a likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED, Batch, are_there, labels_in, shift_left
from hf_ewc.fisher.likelihood.alignment import Alignments
from hf_ewc.fisher.likelihood.categorical import Categorical, SoftCategorical
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.fisher.likelihood.forward import Outputs
from hf_ewc.fisher.likelihood.independent import Bernoulli, Gaussian, Independent
from hf_ewc.fisher.likelihood.joint import Joint

SOFTMAX, YES_NO, REGRESSION = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip
# What images leave out, in the configurations of `transformers` that do not say it.
_IMAGE_IGNORED = 255


@dataclass(frozen=True)
class Reading:
    """A likelihood that a head may have.

    Args:
        meaning: in words.
        problem_type: as `config.problem_type` names it; None where it has no name for it.
        read: p(y | x) of a batch, from the outputs of a forward.
        shifted: whether position t predicts label t + 1.
        axis: of the logits, over which a softmax is taken; None where there is none.
        needs_labelled_forward: whether the outputs have to be those of a forward with labels.
    """

    meaning: str
    problem_type: str | None
    read: Callable[[Outputs, Batch], Distribution]
    shifted: bool = False
    axis: int | None = None
    needs_labelled_forward: bool = False


def readings(outputs: Outputs, batch: Batch) -> list[Reading]:
    """What outputs of this shape may mean for labels of this one, the likeliest first."""
    logits, labels = logits_of(outputs), labels_in(batch)
    found = [*_of_positions(logits, labels, batch), *_of_images(logits, labels)]
    if labels.numel() == logits.numel():
        found += _of_outputs(logits, labels, batch)
    if outputs.ctc is not None:
        found.append(Reading("CTC", None, _alignments, needs_labelled_forward=True))
    return found


ANSWER = Reading(
    "a softmax over positions for the start and one for the end", None,
    lambda outputs, batch: Joint([_position(outputs, batch, side) for side in ("start", "end")]),
)  # fmt: skip


def _of_positions(logits: Tensor, labels: Tensor, batch: Batch) -> Iterator[Reading]:
    if labels.is_floating_point() or logits.dim() < 2:
        return
    is_image = logits.dim() == 4 and labels.dim() == 3  # of which `_of_images` knows more
    second = not is_image and labels.dim() > 1 and logits.shape[1] > 1
    if second and labels.shape == _without_axis(logits, 1):
        yield Reading("a softmax over the second axis", SOFTMAX, _second_axis, axis=1)
    if logits.shape[-1] < 2 or labels.numel() != logits[..., 0].numel():
        return
    sequence = labels.dim() > 1 and labels.shape == logits.shape[:-1]
    masks = [False, True] if sequence and attention_of(batch, labels) is not None else [False]
    for attended in masks:
        for shifted in (False, True) if sequence else (False,):
            words = "a softmax over classes" + (" at each position" if sequence else "")
            words += ", shifted by one" * shifted + ", without padding" * attended
            yield Reading(words, SOFTMAX, _softmax(shifted, attended), shifted, axis=-1)


def _without_axis(tensor: Tensor, axis: int) -> tuple[int, ...]:
    return (*tensor.shape[:axis], *tensor.shape[axis + 1 :])


def _second_axis(outputs: Outputs, batch: Batch) -> Distribution:
    """As `torch.nn.functional.cross_entropy` has the classes."""
    return _categorical(logits_of(outputs).movedim(1, -1), labels_in(batch).long())


def _softmax(shifted: bool, attended: bool) -> Callable[[Outputs, Batch], Distribution]:
    def read(outputs: Outputs, batch: Batch) -> Distribution:
        logits, labels = logits_of(outputs), labels_in(batch)
        _check_number(logits[..., 0], logits, labels)
        labels = labels.reshape(logits.shape[:-1]).long()
        labels = _without_padding(labels, batch) if attended else labels
        labels = shift_left(labels) if shifted else labels
        return _categorical(logits, labels)

    return read


def _check_number(places: Tensor, logits: Tensor, labels: Tensor) -> None:
    if places.numel() != labels.numel():
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} came with labels of shape "
            f"{tuple(labels.shape)}, which earlier batches, or the whole one, did not show. What "
            "belongs to which example is told by the first axis of each input: give a data set of "
            "examples with its data_collator, or batches of one example."
        )


def _categorical(logits: Tensor, labels: Tensor) -> Categorical:
    examples = logits.shape[0]
    logits = logits.reshape(examples, -1, logits.shape[-1])
    labels = labels.reshape(examples, -1)
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
    if outside.any():
        raise ValueError(
            f"Label {int(labels[outside][0])} is outside the {logits.shape[-1]} classes of the "
            f"model; labels must be 0 … {logits.shape[-1] - 1}, or {IGNORED} to be left out, "
            "also where the model's loss has another ignore_index."
        )
    return Categorical(logits, labels)


def _of_images(logits: Tensor, labels: Tensor) -> Iterator[Reading]:
    """A class for each pixel: (B, C, h, w) logits, drawn out to the labels' (B, H, W)."""
    if logits.dim() != 4 or labels.dim() != 3 or labels.is_floating_point():
        return
    if logits.shape[1] > 1:
        yield Reading("a softmax over classes at each pixel", SOFTMAX, _pixel_classes, axis=1)
    else:
        yield Reading("yes or no at each pixel", YES_NO, _pixel_answers)


def _drawn_out(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-2:] == labels.shape[-2:]:
        return logits
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def _pixel_classes(outputs: Outputs, batch: Batch) -> Distribution:
    logits, labels = logits_of(outputs), labels_in(batch).long()
    ignored = (labels == _IMAGE_IGNORED) & (logits.shape[1] <= _IMAGE_IGNORED)
    return _categorical(
        _drawn_out(logits, labels).movedim(1, -1), labels.masked_fill(ignored, IGNORED)
    )


def _pixel_answers(outputs: Outputs, batch: Batch) -> Distribution:
    labels = labels_in(batch)
    logits = _drawn_out(logits_of(outputs), labels)
    labels = labels.masked_fill((labels < 0) | (labels == _IMAGE_IGNORED), IGNORED)
    return Bernoulli(logits.flatten(1), labels.flatten(1))


def _of_outputs(logits: Tensor, labels: Tensor, batch: Batch) -> Iterator[Reading]:
    """A label for each output, or a share of each class."""
    if logits.dim() > 1 and logits.shape[-1] > 1 and labels.shape == logits.shape:
        yield Reading("a softmax over classes with shares as labels", SOFTMAX, _shares, axis=-1)
    sequence = labels.dim() == 2 and attention_of(batch, labels) is not None
    for attended in (False, True) if sequence else (False,):
        words = ", without padding" * attended
        yield Reading("yes or no for each output" + words, YES_NO, _each(Bernoulli, attended))
        yield Reading("a normal distribution" + words, REGRESSION, _each(Gaussian, attended))


def _each(kind: type[Independent], attended: bool) -> Callable[[Outputs, Batch], Distribution]:
    def read(outputs: Outputs, batch: Batch) -> Distribution:
        logits, labels = logits_of(outputs), labels_in(batch)
        labels = _without_padding(labels, batch) if attended else labels
        if kind is Bernoulli and not are_shares(labels):
            raise ValueError(
                "Labels that say yes or no are 0 and 1, or between; these are "
                f"{float(labels[are_there(labels)].min())} to "
                f"{float(labels[are_there(labels)].max())}."
            )
        _check_number(logits, logits, labels)
        examples = len(logits)
        return kind(logits.reshape(examples, -1), labels.reshape(examples, -1))

    return read


def _shares(outputs: Outputs, batch: Batch) -> Distribution:
    logits, targets = logits_of(outputs), labels_in(batch)
    examples, classes = logits.shape[0], logits.shape[-1]
    targets = targets.reshape(examples, -1, classes)
    labels = targets.argmax(-1).masked_fill(~are_there(targets).all(-1), IGNORED)
    return SoftCategorical(logits.reshape(examples, -1, classes), labels, targets)


def attention_of(batch: Batch, labels: Tensor) -> Tensor | None:
    """Which positions of a text are no padding, (B, T); None where that is not said."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.shape == labels.shape else None


def _without_padding(labels: Tensor, batch: Batch) -> Tensor:
    mask = attention_of(batch, labels)
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)


def _alignments(outputs: Outputs, batch: Batch) -> Distribution:
    if outputs.ctc is None:
        raise ValueError("The forward did not call ctc_loss.")
    call = outputs.ctc
    return Alignments(call.log_probabilities, call.frames, call.labels, call.blank)


def _position(outputs: Outputs, batch: Batch, side: str) -> Categorical:
    labels = batch.get(f"{side}_positions")
    if not isinstance(labels, Tensor):
        raise ValueError(f"The data has no '{side}_positions', the labels of question answering.")
    logits = outputs.values[f"{side}_logits"]
    labels = labels.reshape(-1, 1)
    labels = labels.masked_fill((labels < 0) | (labels >= logits.shape[-1]), IGNORED)
    return Categorical(logits.unsqueeze(1), labels)


def logits_of(outputs: Outputs) -> Tensor:
    logits = outputs.logits
    if logits is None:
        raise TypeError("The outputs have no logits.")
    return logits


def are_shares(labels: Tensor) -> bool:
    """Whether all labels that are there lie between 0 and 1."""
    values = labels[are_there(labels)]
    return bool(((values >= 0) & (values <= 1)).all())


def looks_binary(labels: Tensor) -> bool:
    values = labels[are_there(labels)]
    return bool(((values == 0) | (values == 1)).all())
