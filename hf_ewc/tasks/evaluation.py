"""The score of a task, and how it is measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction

from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.named_metrics import NamedMetrics
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.task import Figures, Metrics, Task
from hf_ewc.tasks.token_scores import TokenScores, is_causal
from hf_ewc.training.evaluating import all_of_its_own_data

logger = logging.getLogger("hf_ewc")


class NoLabels(ValueError):
    """There is no label to be right about."""


# What a Trainer adds to the metrics about itself; its figures of memory begin with `mem_`.
_TIMINGS = {
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "tokens_per_second",
    "model_preparation_time",
    "jit_compilation_time",
}


def evaluate(
    trainer: Any, tasks: Sequence[Task], plan: Plan, space: LabelSpace, collator: Any
) -> dict[str, Figures]:
    """The metrics by task, each on its own evaluation data, with its own classes and collator.

    `collator` is for the tasks that have none.
    """
    found = {}
    for task in tasks:
        prefix = f"eval_{task.name}"
        with all_of_its_own_data(trainer), scoring(trainer, task, plan, collator), space.of(task):
            metrics = trainer.evaluate(task.eval_dataset, metric_key_prefix=prefix)
        found[task.name] = figures_with_score(metrics, prefix, task)
    return found


@contextmanager
def scoring(trainer: Any, task: Task, plan: Plan, collator: Any) -> Iterator[None]:
    """Inside the block the trainer has the task's collator, or `collator`, and its metrics."""
    own = trainer.data_collator, trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    try:
        trainer.data_collator = task.data_collator or collator
        found_by = trainer.compute_metrics = metrics_of(task, plan, trainer.model)
        if isinstance(found_by, TokenScores):
            trainer.preprocess_logits_for_metrics = found_by.sums
        yield
    finally:
        trainer.data_collator, trainer.compute_metrics, trainer.preprocess_logits_for_metrics = own


def figures_of(metrics: Mapping[str, Any], prefix: str) -> Figures:
    """The entries `prefix_…` that are single numbers and no timings, without the prefix.

    What is no finite number, as the perplexity of a run that diverged or an int beyond the floats,
    is None.
    """
    begin = f"{prefix}_"
    found = {
        key.removeprefix(begin): single(value)
        for key, value in metrics.items()
        if key.startswith(begin)
    }
    return {
        key: _finite(value)
        for key, value in found.items()
        if key not in _TIMINGS and not key.startswith("mem_") and value is not None
    }


def figures_with_score(metrics: Mapping[str, Any], prefix: str, task: Task) -> Figures:
    """As `figures_of`, with the task's score also where the metrics leave it at None."""
    figures = figures_of(metrics, prefix)
    if metrics.get(f"{prefix}_{task.metric}", 0) is None:
        figures[task.metric] = None
    return figures


def single(value: Any) -> float | int | None:
    """A number, also out of an array or a tensor of no axes; None where it is something else."""
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    return value if isinstance(value, (int, float)) else None


def _finite(value: float) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def warn_of_lost(found: Mapping[str, Figures], earlier: Sequence[Mapping[str, Figures]]) -> None:
    """Say once which figures are None; those that were so after an earlier task were said."""
    lost = [
        f"{name} on {task!r}"
        for task, figures in found.items()
        for name, value in figures.items()
        if value is None and not any(row.get(task, {}).get(name, 0) is None for row in earlier)
    ]
    if lost:
        logger.warning(
            "Evaluation gave no finite number for %s; the results keep null.", ", ".join(lost)
        )


def metrics_of(task: Task, plan: Plan, model: nn.Module) -> Metrics | None:
    """The function for the task's metrics: its own, the run's, or accuracy where that is asked.

    Metrics given by name come beside the accuracy that is the score; language models without any
    have their perplexity.
    """
    given = task.compute_metrics or plan.compute_metrics
    if callable(given):
        return given
    shifted = is_causal(model)
    by_accuracy = task.metric == "accuracy"
    if given is None and (shifted or task.metric == "perplexity"):
        return TokenScores(shifted, with_accuracy=by_accuracy)
    default = partial(accuracy, shifted=shifted) if by_accuracy else None
    return default if given is None else NamedMetrics(given, shifted, beside=default)


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
        raise NoLabels("accuracy got no labels; the evaluation data needs some that are not -100.")
    if np.isnan(logits[counted]).any():  # of which argmax would make a class
        return {"accuracy": math.nan}
    return {"accuracy": float((logits.argmax(-1) == labels)[counted].mean())}
