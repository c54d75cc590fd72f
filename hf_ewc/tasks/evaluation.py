"""The score of a task, and how it is measured."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction


def accuracy(prediction: EvalPrediction, shifted: bool = False) -> dict[str, float]:
    """The share of labels that have the highest logit; labels of -100 do not count.

    Args:
        shifted: whether position t predicts label t + 1, as in a causal language model.

    Raises:
        ValueError: there are no labels, or none of which one logit of several is to be the highest.
    """
    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    labels = np.asarray(prediction.label_ids)
    if labels.dtype.kind not in "iub" or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
        raise ValueError(
            f"accuracy got labels of shape {labels.shape} and dtype {labels.dtype} for outputs of "
            f"shape {logits.shape}; needed is one class for each row of outputs. Give the tasks "
            "metric='loss', or compute_metrics= and the metric= that is the score."
        )
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    if not counted.any():
        raise ValueError(
            "accuracy got no labels; the evaluation data needs some that are not -100."
        )
    return {"accuracy": float((logits.argmax(-1) == labels)[counted].mean())}
