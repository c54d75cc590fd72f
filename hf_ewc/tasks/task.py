"""One task of a sequence: its data, its classes, its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_ewc.metrics.direction import less_is_better

Metrics = Callable[[EvalPrediction], dict[str, float]]
# What evaluation gave, by name; None where that was no finite number.
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Args:
        name: unlike the other tasks'.
        train_dataset: as a Trainer takes it.
        eval_dataset: what the task's score is measured on, always the same.
        classes: the task's own labels on the shared head, for task-incremental learning: the score
            takes only these into account, and so do training and Fisher unless `run_tasks` is told
            otherwise. Tasks with disjoint classes have heads of their own, since another task's
            rows of the head then get no gradient.
        data_collator: instead of the runner's.
        compute_metrics: instead of the runner's: a function, or a name or names that
            `evaluate.load` knows, whose figures come beside the accuracy.
        metric: which entry of the metrics is the score, such as "accuracy", "loss", "perplexity"
            (of a language model, per token).
        head: a head of the task's own over the shared backbone: a number of labels, or a
            `hf_ewc.tasks.Head` (or its arguments in a dict), with another problem type or the head
            of another model class. Without it the task has the head that the model came with.
        training_args: settings of `TrainingArguments` in place of the run's, such as
            `{"num_train_epochs": 5, "learning_rate": 1e-4}`.
        weight: of the task in the sum of penalties.
        fisher_dataset: what the Fisher is estimated on; by default the training data.
        greater_is_better: whether more of the metric is better; by default that is so, but for
            losses and errors by their names ("loss", "perplexity", "mse", "wer", …). Where less is
            better the score is taken with the other sign.
    """

    name: str
    train_dataset: Any
    eval_dataset: Any
    classes: Sequence[int] | None = None
    data_collator: Callable[..., Any] | None = None
    compute_metrics: Metrics | str | Sequence[str] | None = None
    metric: str = "accuracy"
    head: Any = None
    training_args: Mapping[str, Any] | None = None
    weight: float = 1.0
    fisher_dataset: Any = None
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        classes: Any = self.classes
        if classes is None:
            return
        if hasattr(classes, "tolist"):  # an array or a tensor
            classes = classes.tolist()
            object.__setattr__(self, "classes", classes)
        if not isinstance(classes, Sequence) or not all(map(_is_label, classes)):
            raise TypeError(
                f"the classes of task {self.name!r} are {classes!r:.60}; needed is a list of the "
                "numbers of its labels, such as [0, 1]."
            )

    @property
    def lower_is_better(self) -> bool:
        """Whether the score is the metric with the other sign."""
        return less_is_better(self.metric, self.greater_is_better)


def _is_label(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_))


def score_of(task: Task, metrics: Mapping[str, float | None]) -> float | None:
    """The task's score, of which more is better; None where it was no finite number.

    Raises:
        ValueError: evaluation returned no such metric.
    """
    if not metrics:
        raise ValueError(
            f"task {task.name!r} is scored by {task.metric!r}, and evaluation returned nothing: "
            "its examples have no labels by a name that the trainer knows ('labels', or "
            "label_names of the training arguments), or the model returns no loss for them."
        )
    if task.metric not in metrics:
        raise ValueError(
            f"task {task.name!r} is scored by {task.metric!r}; evaluation returned "
            f"{sorted(metrics)}. Set the task's metric to one of these, or its compute_metrics."
        )
    score = metrics[task.metric]
    return -score if score is not None and task.lower_is_better else score
