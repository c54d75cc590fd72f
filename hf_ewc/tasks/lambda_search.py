"""The search for λ before a task: short trainings, scored on training examples held out of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from hf_ewc.fisher.untouched import preserved_random_states
from hf_ewc.tasks.beginning import Beginning
from hf_ewc.tasks.checks import check_rows
from hf_ewc.tasks.evaluation import evaluate
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.main_process import by_main_process, is_main
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.protection import Protection
from hf_ewc.tasks.record import Record
from hf_ewc.tasks.same_run import length
from hf_ewc.tasks.scenario import commonest_share
from hf_ewc.tasks.task import Task, score_of
from hf_ewc.tasks.task_training import TaskTraining
from hf_ewc.tasks.training_data import TrainingData, without
from hf_ewc.training.held_out import held_out_rows, number_of_labels, rows_of
from hf_ewc.training.lambda_curve import LambdaCurve, Trial
from hf_ewc.training.repeatable import as_before
from hf_ewc.training.short_training import for_a_share

logger = logging.getLogger("hf_ewc")

HALFWAY = 1000  # examples, at most: a score that is hopeless is far from one that is not


@dataclass(frozen=True)
class _Task:
    """What the trials of one task share: its number, their data, the held-out part, the model.

    `sample` is the task with at most `HALFWAY` of the held-out examples, for a look half way.
    """

    index: int
    data: TrainingData
    held_out: Task
    sample: Task
    args: Arguments
    model: nn.Module


class LambdaSearch:
    """Finds λ for one task after another, as `LambdaCurve` tells, by trials.

    A trial trains with everything the plan asks for, on four fifths of the task's own training data
    (and on all that is replayed), for a share of its steps; the other fifth scores it. Then the
    weights are put back. Trials that an earlier process has made are in the record and not made
    again. Callbacks of the user's see the training alone, not the trials before it.

    Args:
        plan: of the run.
        space: what the model shows to each task.
        protection: which is told the λ that was found.
        training: makes the trainers.
        record: keeps every trial.
    """

    def __init__(
        self,
        plan: Plan,
        space: LabelSpace,
        protection: Protection,
        training: TaskTraining,
        record: Record,
    ) -> None:
        self._plan, self._space, self._protection = plan, space, protection
        self._training, self._record = training, record
        self._has_warned = False

    def find(self, index: int, model: nn.Module, data: TrainingData) -> None:
        """Set λ for task `index`, whose training data these are; nothing else has changed then."""
        if self._plan.config is None or not self._plan.config.finds_lambda:
            return
        if not self._protection.state:
            return  # nothing to hold on to yet
        curve = self._begun(index)
        if curve.chosen is None:
            collator = self._plan.tasks[index].data_collator or self._training.collator
            with as_before(collator, but_for=model):
                curve = self._searched(curve, index, model, data)
            if is_main():
                logger.warning("%s", curve.in_words())
            self._warn_once(curve, index, data)
        self.use_found(index)

    def _warn_once(self, curve: LambdaCurve, index: int, data: TrainingData) -> None:
        """Say why trials tell nothing, of the first task of the run where that is so."""
        said = curve.warning(self._training.arguments(index, data).learning_rate)
        if said and not self._has_warned and is_main():
            logger.warning("%s", said)
        self._has_warned = self._has_warned or bool(said)

    def use_found(self, index: int) -> None:
        """Set the λ that the record has for task `index`, if it has one."""
        name = self._plan.tasks[index].name
        for curve in self._record.searches:
            if curve.task == name and curve.chosen is not None:
                self._protection.use(curve.chosen)

    def _begun(self, index: int) -> LambdaCurve:
        """What the record knows of the task's search, or a new one, from the state's λ on."""
        name = self._plan.tasks[index].name
        for curve in self._record.searches:
            if curve.task == name:
                return curve
        config = self._plan.config
        earlier = self._record.searches
        told = self._protection.told_lambda(index)
        return LambdaCurve(
            name,
            first=told,
            give_up=config.ewc_give_up if config is not None else 0.0,
            by_improvement=self._plan.tasks[index].lower_is_better,
            left=self._steps_left(index, earlier),
            told=told,
        )

    def _steps_left(self, index: int, earlier: list[LambdaCurve]) -> int:
        """The steps of all trainings before, but for those of the trials before."""
        spent = sum(trial.steps for curve in earlier for trial in curve.trials)
        return sum(self._record.steps[:index]) - spent

    def _searched(
        self, curve: LambdaCurve, index: int, model: nn.Module, data: TrainingData
    ) -> LambdaCurve:
        task = self._task(index, model, data)
        before = _Weights(model, self._space)
        while (strength := curve.upcoming()) is not None:
            try:
                curve = self._with_trial(curve, task, strength)
            finally:
                before.put_back(model)
            self._record.keep_search(curve)
            by_main_process(self._record.write_results)
        return curve

    def _task(self, index: int, model: nn.Module, data: TrainingData) -> _Task:
        task, args = self._plan.tasks[index], self._training.arguments(index, data)
        check_rows(task, "ewc_lambda='auto'")
        rows = data.held_out or held_out_rows(len(task.train_dataset), args.seed)
        left = without(data, [x.train_dataset for x in self._plan.tasks], index, rows)
        held_out, sample = (
            replace(task, eval_dataset=rows_of(task.train_dataset, some))
            for some in (rows, rows[:: math.ceil(len(rows) / HALFWAY)])
        )
        whole, part = length(data.dataset), length(left.dataset)
        return _Task(index, left, held_out, sample, for_a_share(args, whole or 1, part or 1), model)

    def _with_trial(self, curve: LambdaCurve, task: _Task, strength: float) -> LambdaCurve:
        began = time.perf_counter()
        trainer = self._trainer(task, strength)
        if curve.before is None:
            by_share = task.held_out.metric == "accuracy"
            data = task.held_out.eval_dataset
            curve = replace(
                curve,
                before=self._score(trainer, task.held_out),
                labels=number_of_labels(data) if by_share else 0,
                chance=commonest_share(data) if by_share else None,
            )
        halfway = HalfWay(lambda: self._score(trainer, task.sample), curve.is_hopeless)
        trainer.add_callback(halfway)
        self._training.train(trainer, task.index, task.data)
        score = None if halfway.stopped else self._score(trainer, task.held_out)
        return curve.with_trial(
            Trial(
                strength,
                score,
                halfway.score,
                halfway.stopped,
                steps=trainer.state.global_step,
                seconds=time.perf_counter() - began,
            )
        )

    def _trainer(self, task: _Task, strength: float) -> Any:
        config = self._protection.config
        if config is not None:
            config = replace(config, ewc_lambda=strength)
        given = self._protection.given(task.index, task.model, config=config, with_ewc=strength > 0)
        trainer = self._training.trainer(
            task.model, task.index, task.data, given, task.args, leave_out="callbacks"
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(NOT_IN_SHARDS)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _score(self, trainer: Any, task: Task) -> float | None:
        """The task's own score on its held-out examples, the same in every process."""
        with preserved_random_states():
            collator = self._training.collator
            found = evaluate(trainer, [task], self._plan, self._space, collator)
        score = [score_of(task, found[task.name])]
        if PartialState().num_processes > 1:
            broadcast_object_list(score)
        return score[0]


class HalfWay(TrainerCallback):
    """Scores after half of the steps, and stops a training that is hopeless then.

    Args:
        score: measures it.
        is_hopeless: of that score.
    """

    def __init__(
        self,
        score: Callable[[], float | None],
        is_hopeless: Callable[[float | None], bool],
    ) -> None:
        self._measure, self._is_hopeless = score, is_hopeless
        self.score: float | None = None
        self.stopped = False

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.max_steps > 1 and state.global_step == state.max_steps // 2:
            self.score = self._measure()
            self.stopped = control.should_training_stop = self._is_hopeless(self.score)


class _Weights:
    """The weights of a model and of all heads as they are now."""

    def __init__(self, model: nn.Module, space: LabelSpace) -> None:
        self._model = Beginning(model)
        self._heads = space.heads
        tensors = {} if self._heads is None else self._heads._tensors()
        self._values = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        self._model.restore(model)
        model.zero_grad(set_to_none=True)
        if self._heads is not None:
            for name, tensor in self._heads._tensors().items():
                tensor.copy_(self._values[name])


def check_search(plan: Plan) -> None:
    """Refuse, before the first step, what λ cannot be found with.

    Raises:
        ValueError: with what to use instead.
    """
    if plan.config is None or not plan.config.finds_lambda:
        return
    for task in plan.tasks[1:]:
        check_rows(task, "ewc_lambda='auto'")
    if plan.trainer_kwargs.get("optimizers") not in (None, (None, None)):
        raise ValueError(
            "ewc_lambda is 'auto' and optimizers= are given, whose state would go from one trial "
            "to the next; let the trainer make its own (args.optim, or optimizer_cls_and_kwargs)."
        )
    if plan.args.fsdp or plan.args.deepspeed:
        raise ValueError(NOT_IN_SHARDS)


NOT_IN_SHARDS = (
    "ewc_lambda is 'auto', which does not go with models in shards (FSDP, DeepSpeed): the weights "
    "could not be put back after a trial. Use DDP, or give ewc_lambda a number."
)
