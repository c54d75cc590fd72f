"""The score of a task, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction

from hf_ewc.fisher.likelihood.label_shift import shifts_labels
from hf_ewc.parameters.names import unwrap
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.task import Metrics, Task


def evaluate(
    trainer: Any, tasks: Sequence[Task], plan: Plan, space: LabelSpace
) -> dict[str, dict[str, float]]:
    """The metrics by task, each on its own evaluation data, with its own classes and collator.

    The trainer's collator and metrics are exchanged for each task's, and put back at the end.
    """
    own = trainer.data_collator, trainer.compute_metrics
    found = {}
    try:
        for task in tasks:
            trainer.data_collator = task.data_collator or plan.data_collator or own[0]
            trainer.compute_metrics = metrics_of(task, plan, trainer.model)
            prefix = f"eval_{task.name}"
            with space.of(task):
                metrics = trainer.evaluate(task.eval_dataset, metric_key_prefix=prefix)
            found[task.name] = numbers(metrics, prefix)
    finally:
        trainer.data_collator, trainer.compute_metrics = own
    return found


def numbers(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The entries `prefix_…` that are single numbers and no timings, without the prefix."""
    return {
        key.removeprefix(f"{prefix}_"): float(value)
        for key, value in metrics.items()
        if key.startswith(prefix)
        and not key.endswith(("_runtime", "_per_second"))
        and np.ndim(value) == 0
        and isinstance(value, (int, float, np.number))
    }


def metrics_of(task: Task, plan: Plan, model: nn.Module) -> Metrics | None:
    """The function for the task's metrics: its own, the run's, or accuracy where that is asked."""
    given = task.compute_metrics or plan.compute_metrics
    if given is not None or task.metric != "accuracy":
        return given
    return partial(accuracy, shifted=bool(shifts_labels(unwrap(model))))


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
