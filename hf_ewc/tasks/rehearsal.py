"""The first examples of what a run is scored by, looked at before anything is learnt.

So a run does not end after hours on what can be seen before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import EvalPrediction, Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import nested_numpify

from hf_ewc.parameters.names import unwrap
from hf_ewc.parameters.sharding import is_sharded
from hf_ewc.tasks.evaluation import NoLabels, figures_with_score, scoring, single
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.task import Task, score_of
from hf_ewc.training.held_out import has_rows
from hf_ewc.training.repeatable import evaluated_as_if_not_run

EXAMPLES = 2
_PREFIX = "eval"


class Rehearsal:
    """Looks at what a run is to be scored by, once.

    Args:
        plan: of the run.
        space: what the model's outputs mean for each task.
    """

    def __init__(self, plan: Plan, space: LabelSpace) -> None:
        self._plan, self._space = plan, space
        self._known: set[str] = set()

    def look(self, trainer: Any, index: int, collator: Any) -> None:
        """At the tasks that were not looked at; where the head grows, at task `index` alone."""
        plan = self._plan
        tasks = plan.tasks[index : index + 1] if plan.sequence.grow_head else plan.tasks
        new = [t for t in (*tasks, *plan.evaluate_also) if t.name not in self._known]
        rehearse(trainer, new, plan, self._space, collator)
        self._known |= {task.name for task in new}


def rehearse(
    trainer: Any, tasks: Sequence[Task], plan: Plan, space: LabelSpace, collator: Any
) -> None:
    """Score the first examples of the tasks' evaluation data, leaving everything as it was.

    Without the trainer's loop, loaders and callbacks; of several processes each looks at the same
    examples, since a trainer's loss may ask the others. Not looked at are streams, models in
    shards, and trainers that evaluate in a way of their own. What users' metrics raise is left
    alone: few examples may be too few for them.

    Raises:
        ValueError: they cannot be run, or bring no score; with the task's name.
        TypeError: metrics come as something else than a dict.
    """
    model = unwrap(trainer.model)
    if not _evaluates_plainly(trainer) or any(map(is_sharded, model.parameters())):
        return

    for task in tasks:
        if not has_rows(task.eval_dataset):
            continue
        with (
            evaluated_as_if_not_run(trainer, model),
            scoring(trainer, task, plan, collator),
            space.of(task),
        ):
            _rehearse(trainer, task, is_own=not (task.compute_metrics or plan.compute_metrics))


def _evaluates_plainly(trainer: Any) -> bool:
    kind: Any = type(trainer)
    loads_plainly = kind.get_eval_dataloader is Trainer.get_eval_dataloader
    return loads_plainly and kind.evaluate in (Trainer.evaluate, Seq2SeqTrainer.evaluate)


def _rehearse(trainer: Any, task: Task, is_own: bool) -> None:
    only_loss = trainer.compute_metrics is None or trainer.args.prediction_loss_only
    try:
        loss, outputs, labels = trainer.prediction_step(
            trainer.model, _first_batch(trainer, task.eval_dataset), only_loss
        )
    except Exception as error:
        raise _cannot_be_scored(task, f"{type(error).__name__}: {error!s:.300}") from error
    figures = {} if loss is None else {"loss": float(loss.detach().float().mean())}
    if not only_loss and outputs is not None and labels is not None:
        if trainer.args.include_for_metrics or not trainer.args.eval_do_concat_batches:
            return  # of the whole evaluation's inputs, losses or batches
        try:
            found = _metrics(trainer, outputs, labels)
        except Exception as error:
            if is_own and not isinstance(error, NoLabels):
                raise _cannot_be_scored(task, str(error)) from error
            return
        if found is None and trainer.args.batch_eval_metrics:  # of all but the last batch
            return
        if not isinstance(found, Mapping):
            raise TypeError(
                f"compute_metrics of task {task.name!r} returned {found!r:.60}, a "
                f"{type(found).__name__}; needed is a dict of figures by name."
            )
        _check_figures(found, task)
        figures |= found
    prefixed = {name if name.startswith(f"{_PREFIX}_") else f"{_PREFIX}_{name}": figure
                for name, figure in figures.items()}  # fmt: skip
    score_of(task, figures_with_score(prefixed, _PREFIX, task))


def _check_figures(found: Mapping[Any, Any], task: Task) -> None:
    """Refuse what the trainer, or the score, could not take: a `TypeError`."""
    for name, figure in found.items():
        if not isinstance(name, str):
            raise TypeError(
                f"compute_metrics of task {task.name!r} names a figure {name!r}, a "
                f"{type(name).__name__}; needed is a string."
            )
        is_score = name.removeprefix(f"{_PREFIX}_") == task.metric
        if is_score and figure is not None and single(figure) is None:
            raise TypeError(
                f"compute_metrics of task {task.name!r} gives {figure!r:.60} as its {name}, a "
                f"{type(figure).__name__}, by which the task is scored; needed is one number."
            )


def _first_batch(trainer: Any, data: Any) -> Any:
    """As the trainer's own loader makes it."""
    count = min(EXAMPLES, len(data), trainer.args.per_device_eval_batch_size)
    if isinstance(data, datasets.Dataset):
        data = trainer._remove_unused_columns(data.select(range(count)), "evaluation")
        return trainer.data_collator([data[i] for i in range(count)])
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, "evaluation")
    return collator([data[i] for i in range(count)])


def _metrics(trainer: Any, outputs: Any, labels: Any) -> Any:
    """None where they are told of the last batch alone."""
    if trainer.args.batch_eval_metrics:
        return None
    if trainer.preprocess_logits_for_metrics is not None:
        outputs = trainer.preprocess_logits_for_metrics(outputs, labels)
    prediction = EvalPrediction(nested_numpify(outputs), nested_numpify(labels))
    return trainer.compute_metrics(prediction)


def _cannot_be_scored(task: Task, why: str) -> ValueError:
    return ValueError(
        f"The first examples of the eval_dataset of task {task.name!r} cannot be scored: {why} "
        "Needed are examples with the columns that the model takes and labels that its head has."
    )
