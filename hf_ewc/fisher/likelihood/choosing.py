"""Which of the readings that outputs and labels admit is the model's likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_ewc.fisher.labels import Batch, are_there, label_name, labels_in
from hf_ewc.fisher.likelihood import refusals
from hf_ewc.fisher.likelihood.forward import Outputs
from hf_ewc.fisher.likelihood.label_shift import shifts_labels
from hf_ewc.fisher.likelihood.made_up_labels import sums_to_one
from hf_ewc.fisher.likelihood.observing import has_labels
from hf_ewc.fisher.likelihood.own_loss import Observation, misfit, rounding
from hf_ewc.fisher.likelihood.readings import (
    ANSWER,
    REGRESSION,
    SOFTMAX,
    YES_NO,
    Reading,
    logits_of,
    looks_binary,
    readings,
)

# Readings fit equally well where the misfit of the best is not this much smaller.
_CLEARLY = 0.1


def candidates_for(outputs: Outputs, batch: Batch) -> list[Reading]:
    """The readings that the shapes admit; none where there are no logits or no labels for them."""
    if outputs.named("start_logits") is not None and outputs.named("end_logits") is not None:
        return [ANSWER]
    if outputs.logits is None or label_name(batch) is None:
        return []
    return readings(outputs, batch)


def by_its_loss(
    model: nn.Module, candidates: Sequence[Reading], observed: Sequence[Observation]
) -> Reading | None:
    """The reading whose −log p is the model's loss; None where there is none.

    Raises:
        ValueError: with and without a shift of the labels it is, and nothing else tells.
    """
    tolerance = rounding(observed)
    finite = [observation for observation in observed if math.isfinite(observation.loss)]
    misfits = [
        (misfit(c.read, finite, tolerance, further_term=c.problem_type == SOFTMAX), c)
        for c in candidates
    ]
    best = min(error for error, _ in misfits)
    if best > tolerance:
        return None
    within = min(tolerance, max(best / _CLEARLY, torch.finfo(torch.float32).eps))
    fits = [candidate for error, candidate in misfits if error <= within]
    if len({candidate.shifted for candidate in fits}) > 1:
        shifted = shifts_labels(model)
        if shifted is None:
            raise refusals.shift_unknown(model)
        fits = [candidate for candidate in fits if candidate.shifted == shifted]
    return fits[0]


def has_further_term(reading: Reading, observed: Sequence[Observation]) -> bool:
    """Whether the loss is −log p by this reading and a term that does not depend on the labels."""
    tolerance = rounding(observed)
    finite = [observation for observation in observed if math.isfinite(observation.loss)]
    return misfit(reading.read, finite, tolerance, further_term=False) > tolerance


def refuse_unclear_shares(model: nn.Module, reading: Reading, batch: Batch) -> None:
    """Of mixed labels that a loss takes for yes or no because nobody has said what they are.

    `transformers` does so by the dtype of the labels.
    """
    if reading.problem_type != YES_NO or not hasattr(model, "config"):
        return
    labels = labels_in(batch)
    if labels.is_floating_point() and sums_to_one(labels) and not looks_binary(labels):
        raise refusals.soft_labels(labels)


def by_what_is_said(
    model: nn.Module, problem_type: str | None, outputs: Outputs, batch: Batch
) -> Reading:
    """The reading of a model without a loss: by `problem_type`, its class, and the shapes.

    Raises:
        ValueError: these leave it open.
    """
    candidates = candidates_for(outputs, batch)
    if candidates == [ANSWER]:
        return ANSWER
    if not candidates:
        raise _nothing_known(outputs, batch)
    if not has_labels(batch):
        return candidates[0]  # nothing of it counts
    fitting = [t for t in outputs.in_a_row if candidates_for(Outputs(t), batch)]
    if len(fitting) > 1:
        raise refusals.several_scores(fitting)
    kind = _kind(candidates, problem_type, outputs, batch)
    labels = labels_in(batch)
    of_classes = kind == SOFTMAX and labels.dim() > 1 and labels.shape == logits_of(outputs).shape
    if of_classes and not sums_to_one(labels) and bool(are_there(labels).all()):
        raise refusals.no_shares(labels)
    if kind == SOFTMAX and sums_to_one(logits_of(outputs)):
        raise refusals.probabilities()
    shifted = shifts_labels(model)
    fits = [candidate for candidate in candidates if candidate.problem_type == kind]
    if len({candidate.axis for candidate in fits}) > 1:
        raise refusals.axis_unknown(logits_of(outputs))
    if shifted is None and any(c.shifted for c in fits) and _are_the_inputs(batch):
        raise refusals.labels_are_inputs(model)
    return next((candidate for candidate in fits if candidate.shifted == bool(shifted)), fits[0])


def _are_the_inputs(batch: Batch) -> bool:
    """Whether the labels are the texts themselves, as those of language models are."""
    labels, ids = labels_in(batch), batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return False
    there = are_there(labels)
    return bool(there.any()) and torch.equal(ids[there], labels[there])


def _nothing_known(outputs: Outputs, batch: Batch) -> ValueError:
    if outputs.logits is None or label_name(batch) is None:
        return refusals.no_logits(outputs.values)
    return refusals.no_head(outputs.logits, labels_in(batch))


def _kind(
    candidates: Sequence[Reading], problem_type: str | None, outputs: Outputs, batch: Batch
) -> str | None:
    kinds = {candidate.problem_type for candidate in candidates}
    if problem_type in kinds:
        return problem_type
    if len(kinds) == 1:
        return kinds.pop()
    logits, labels = logits_of(outputs), labels_in(batch)
    one_each = logits.shape[-1] == 1 or logits.dim() == 1
    if one_each and not looks_binary(labels) and not _are_signs(labels):
        return REGRESSION
    raise refusals.unclear(logits, labels)


def _are_signs(labels: Tensor) -> bool:
    """Whether they are −1 and 1, as a logistic loss or a hinge takes yes and no, too."""
    return bool((labels[are_there(labels)].abs() == 1).all())
