"""The labels in a batch: under which names they come, and which of them are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
LABEL_NAMES = ("labels", "label", "label_ids", "start_positions", "end_positions")
IGNORED = -100
USE_LOG_LIKELIHOOD = (
    "pass log_likelihood= a function of (model, batch) that returns log p(y|x) of each example, "
    "shape (batch,), to estimate_fisher"
)


def are_there(labels: Tensor) -> Tensor:
    """Which labels are not missing, of the same shape: missing are −100 and NaN."""
    there = labels != IGNORED
    return there & ~labels.isnan() if labels.is_floating_point() else there


def label_name(batch: Batch) -> str | None:
    """The name under which the labels come; None for question answering and without labels."""
    names = ("labels", "label", "label_ids")
    return next((name for name in names if isinstance(batch.get(name), Tensor)), None)


def labels_in(batch: Batch) -> Tensor:
    name = label_name(batch)
    if name is None:
        raise no_labels(batch)
    labels: Tensor = batch[name]
    return labels


def further_labels(batch: Batch) -> list[str]:
    """What may be labels besides those that are known, by its name."""
    return [name for name in batch if "label" in name and name not in LABEL_NAMES]


def named_as_labels(name: str) -> bool:
    """Whether a name says nothing but labels: `next_sentence_label`, `labels_2`."""
    return re.search(r"labels?(_?\d+|_ids?)?$", name) is not None


def several_heads(names: Sequence[str]) -> ValueError:
    return ValueError(
        f"The data holds {', '.join(names)} besides its labels: a likelihood of several heads is "
        f"not known here. Leave them out, or {USE_LOG_LIKELIHOOD}."
    )


def require_labels(batch: Batch) -> None:
    """Raise a `ValueError` unless the batch has labels under one of the names that are known."""
    if not any(isinstance(batch.get(name), Tensor) for name in LABEL_NAMES):
        raise no_labels(batch)


def no_labels(batch: Batch) -> ValueError:
    listed = next((n for n in LABEL_NAMES if batch.get(n) is not None), None)
    if listed is not None and not isinstance(batch[listed], Tensor):
        return ValueError(
            f"{listed!r} is a {type(batch[listed]).__name__} in a batch; needed is a tensor with "
            "the labels of each example in a row. Let the data_collator make one, or "
            f"{USE_LOG_LIKELIHOOD}."
        )
    given = f"The data has no labels: a batch holds {', '.join(batch) or 'nothing'}."
    if "return_loss" in batch or {"input_ids", "pixel_values"} <= batch.keys():
        return ValueError(
            f"{given} Needed are 'labels'. A contrast of images and texts, such as CLIP's, is a "
            "softmax over the other examples of the batch, so that no example has a likelihood of "
            "its own and the Fisher would depend on the batch. Estimate it on a classification "
            "head, or state a likelihood, such as a softmax over fixed texts: "
            f"{USE_LOG_LIKELIHOOD}."
        )
    return ValueError(
        f"{given} The Fisher needs 'labels' to know which outputs count; for a language model use "
        "a collator that adds them. A loss over pairs, such as DPO's, is no likelihood of labels: "
        f"take data with labels, or {USE_LOG_LIKELIHOOD}."
    )


def shift_left(labels: Tensor) -> Tensor:
    """Label t + 1 at position t, none at the last."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
