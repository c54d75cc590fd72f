"""One task of a sequence: its data, its classes, its score, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import EvalPrediction, TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.tasks.scenario import SCENARIOS, labels_of

Metrics = Callable[[EvalPrediction], dict[str, float]]


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
        compute_metrics: instead of the runner's.
        metric: which entry of the metrics is the score; more is better, but for "loss", which is
            taken with the other sign.
    """

    name: str
    train_dataset: Any
    eval_dataset: Any
    classes: Sequence[int] | None = None
    data_collator: Callable[..., Any] | None = None
    compute_metrics: Metrics | None = None
    metric: str = "accuracy"


def score_of(task: Task, metrics: Mapping[str, float]) -> float:
    """The task's score, of which more is better; a `ValueError` where evaluation lacks it."""
    if task.metric not in metrics:
        raise ValueError(
            f"task {task.name!r} is scored by {task.metric!r}; evaluation returned "
            f"{sorted(metrics)}. Set the task's metric to one of these, or its compute_metrics."
        )
    return -metrics["loss"] if task.metric == "loss" else metrics[task.metric]


def check_tasks(
    tasks: Sequence[Task],
    args: TrainingArguments,
    config: EWCConfig | None,
    trainer_class: type[Any],
    scenario: str | None,
) -> None:
    """Refuse tasks that cannot be learnt together: a `ValueError`, or a `TypeError`."""
    if not tasks:
        raise ValueError("run_tasks got no tasks; give at least one.")
    if scenario not in (None, *SCENARIOS):
        raise ValueError(f"scenario is {scenario!r}; allowed are {', '.join(SCENARIOS)} or None.")
    if config is not None and not hasattr(trainer_class, "consolidate"):
        raise TypeError(
            f"{trainer_class.__name__} cannot consolidate; with ewc_config, trainer_class must be "
            f"EWCTrainer or a class that begins with EWCMixin."
        )
    for task in tasks:
        if task.classes is None:
            continue
        for kind, data in (("training", task.train_dataset), ("evaluation", task.eval_dataset)):
            outside = labels_of(data) - set(task.classes)
            if outside:
                raise ValueError(
                    f"task {task.name!r} has the labels {sorted(outside)} in its {kind} data, "
                    f"which are not among its classes {list(task.classes)}."
                )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; it would spread over "
                f"the classes of other tasks as well. Set it to 0 for tasks with classes."
            )


def check_types(tasks: Any, args: Any, config: Any) -> None:
    """Refuse arguments of `run_tasks` that are something else: a `TypeError`."""
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Task) for task in tasks):
        raise TypeError("tasks must be a list of hf_ewc.Task, one for each task.")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be TrainingArguments, got {type(args).__name__}.")
    if config is not None and not isinstance(config, EWCConfig):
        raise TypeError(f"ewc_config must be an EWCConfig or None, got {type(config).__name__}.")


def check_score(task: Task, compute_metrics: Metrics | None) -> None:
    """Refuse a task whose score cannot be had, before it is trained: a `ValueError`."""
    if task.eval_dataset is None:
        raise ValueError(f"task {task.name!r} has no eval_dataset, on which its score is measured.")
    if compute_metrics is None and task.metric not in ("accuracy", "loss"):
        raise ValueError(
            f"task {task.name!r} is scored by {task.metric!r}; without compute_metrics there are "
            "'accuracy' and 'loss'."
        )
