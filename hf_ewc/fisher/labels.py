"""The labels in a batch: under which names they come, and which positions count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Batch = dict[str, Any]
LABEL_NAMES = ("labels", "label", "label_ids", "start_positions", "end_positions")
IGNORED = -100


def refuse_further_labels(batch: Batch) -> None:
    further = [name for name in batch if "label" in name and name not in LABEL_NAMES]
    if further:
        raise ValueError(
            f"The data holds {', '.join(further)} besides its labels: a likelihood of several "
            "heads is not known here. Leave them out, or pass log_likelihood= a function of "
            "(model, batch) that returns log p(y|x) of each example."
        )


def labels_in(batch: Batch) -> Tensor:
    for name in ("labels", "label", "label_ids"):
        if isinstance(batch.get(name), Tensor):
            labels: Tensor = batch[name]
            return labels
    raise no_labels(batch)


def require_labels(batch: Batch) -> None:
    """Raise a `ValueError` unless the batch has labels under one of the names that are known."""
    if not any(isinstance(batch.get(name), Tensor) for name in LABEL_NAMES):
        raise no_labels(batch)


def no_labels(batch: Batch) -> ValueError:
    return ValueError(
        f"The data has no labels: a batch holds {', '.join(batch) or 'nothing'}. The Fisher needs "
        "'labels' to know which outputs count; for a language model use a collator that adds them. "
        "A loss over pairs, such as DPO's, is no likelihood of labels: take data with labels, or "
        "estimate_fisher with log_likelihood=."
    )
