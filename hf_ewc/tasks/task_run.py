"""One run over a sequence of tasks: the model as it goes from task to task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import ProgressCallback, set_seed

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.parameters.names import parameters_by_name, unwrap
from hf_ewc.parameters.sharding import is_dtensor, is_sharded
from hf_ewc.processes import check_launch
from hf_ewc.report import measured
from hf_ewc.state.by_layer import importance_by_layer
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.arguments import arguments_of
from hf_ewc.tasks.blueprint import Blueprint
from hf_ewc.tasks.evaluation import evaluate, metrics_of, warn_of_lost
from hf_ewc.tasks.folder_lock import only_run_in
from hf_ewc.tasks.head import head_names
from hf_ewc.tasks.history import history_of
from hf_ewc.tasks.l2_sp import with_l2_sp
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.learning_rates import learning_rate_factors, only_these_train, trained_names
from hf_ewc.tasks.main_process import by_main_process, held_by_main_process, is_main
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.progress import TaskProgress
from hf_ewc.tasks.record import Record
from hf_ewc.tasks.run_folder import RunFolder
from hf_ewc.tasks.sequence_trainer import Additions, SequenceMixin, sequence_trainer
from hf_ewc.tasks.task import Figures, Task, score_of
from hf_ewc.tasks.tracking import SequenceTracker
from hf_ewc.tasks.training_data import TrainingData, training_data
from hf_ewc.tasks.warm_up import HeadWarmUp
from hf_ewc.training.checkpoints import newest_whole_checkpoint
from hf_ewc.training.converted_weights import needs_conversion
from hf_ewc.training.saved_weights import load_weights
from hf_ewc.training.trainer import EWCMixin

logger = logging.getLogger("hf_ewc")


class TaskRun:
    """Learns the tasks of a plan in a row, and goes on where an earlier run of it ended.

    Args:
        plan: what is asked for.
        model: as it was before the first task.
        state: what protects it already during the first task.
        matrix: to be filled.
    """

    def __init__(
        self, plan: Plan, model: nn.Module, state: EWCState | None, matrix: AccuracyMatrix
    ) -> None:
        self.plan, self.model, self.state = plan, model, state
        self.folder = RunFolder(str(plan.args.output_dir), plan.tasks)
        self.record = Record(plan, self.folder, matrix)
        self.space = LabelSpace(model, plan.tasks)
        self._collator: Any = None
        self._blueprint: Blueprint | None = None
        self._beginning = _copied(model) if plan.sequence.joint_training else {}
        self._is_resumed = False
        self._tracker = SequenceTracker(plan.args, integrations=())

    @contextmanager
    def started(self, resume: bool) -> Iterator[None]:
        """Inside the block the folder is this run's, which goes on from its results or is new.

        Raises:
            ValueError: another run is at work in the folder, or it holds something else.
        """
        _ = self.plan.args.device  # sets up the process group, if there is to be one
        check_launch(PartialState().num_processes)
        with held_by_main_process(only_run_in(self.folder.path)):
            by_main_process(self.folder.remove_temporary)
            if resume:
                self.folder.check()
            found = self._is_resumed = resume and self.folder.results.exists()
            if found:
                self._restore()
            # Everyone has looked before anyone writes.
            PartialState().wait_for_everyone()
            if not found:
                by_main_process(self._begin)
            yield

    def _begin(self) -> None:
        self.folder.clear()
        self.record.begin(self.model)

    def learn_all(self) -> None:
        """Learn the tasks that are not learnt yet."""
        if self.record.done == len(self.plan.tasks):
            by_main_process(lambda: self.record.complete(self.model))
        with self.space, self._progress() as progress, self._tracked():
            for index in range(self.record.done, len(self.plan.tasks)):
                self._learn(index, progress)

    def _learn(self, index: int, progress: TaskProgress | None) -> None:
        """Train, consolidate and evaluate one task, and save everything."""
        if self.plan.sequence.joint_training and index:
            self._begin_again()
        with measured() as cost:
            trainer = self._learnt(index, progress)
        self.record.costs.append(cost)
        self.record.history.append(history_of(trainer.state.log_history))
        self.record.steps.append(trainer.state.global_step)
        self.record.importance = None if self.state is None else importance_by_layer(self.state)
        by_main_process(lambda: self._keep(index))
        if index + 1 < len(self.plan.tasks):
            self._make_whole()

    def _learnt(self, index: int, progress: TaskProgress | None) -> Any:
        """The trainer that has trained, consolidated, scored and saved the task."""
        data = training_data(self.plan, index, self.space.tells_tasks_apart)
        if data.replayed is not None:
            by_main_process(lambda: self.folder.note_replay(index, data.replayed or {}))
        trainer = self._trainer(index, data)
        if trainer.is_fsdp_enabled:
            _check_saves_whole(trainer)
            self._draw_blueprint()
        trainer.remove_callback(ProgressCallback)
        if progress is not None:
            progress.begin(index)
            trainer.add_callback(progress)
        self._tracker.begin(index, sum(self.record.steps))
        trainer.add_callback(self._tracker)
        if index == 0:
            self._score_untrained(trainer)
        self._train(trainer, index, data)
        self._score(trainer, index)
        trainer.save_model(str(self.folder.model(index)))
        trainer.accelerator.wait_for_everyone()
        return trainer

    def _keep(self, index: int) -> None:
        self.record.write(self.model)
        if self.plan.sequence.keep_models == "last":
            for earlier in range(index):
                self.folder.remove_model(earlier)

    def _begin_again(self) -> None:
        """Put the model back to where the first task began."""
        if any(map(is_sharded, self.model.parameters())):
            raise ValueError("joint_training does not go with models in shards (FSDP, ZeRO-3).")
        unwrap(self.model).load_state_dict(self._beginning)

    def _train(self, trainer: Any, index: int, data: TrainingData) -> None:
        """Train the task as the plan asks, and fold it into the state."""
        plan, task = self.plan, self.plan.tasks[index]
        collator = trainer.data_collator
        with self.space.of(task if plan.mask_training else None):
            set_seed(trainer.args.seed)
            trainer.data_collator = data.collator(trainer, plan, self._collator)
            with only_these_train(self.model, self._trained_names()):
                self._attach(trainer)
                trainer.train(resume_from_checkpoint=self._checkpoint(trainer))
            trainer.data_collator = collator
            if plan.config is not None:
                self.state = self._consolidate(trainer, index, data)

    def _trained_names(self) -> list[str]:
        sequence = self.plan.sequence
        if sequence.trained_modules is None and sequence.frozen_modules is None:
            return list(parameters_by_name(self.model))
        return trained_names(self.model, sequence)

    def _attach(self, trainer: Any) -> None:
        """What a sequence adds to the trainer's steps."""
        if not isinstance(trainer, SequenceMixin):
            return
        sequence = self.plan.sequence
        trainer.additions.factors = learning_rate_factors(
            self.model, cast("dict[str, float]", sequence.learning_rate_factors or {})
        )
        if sequence.head_warmup_share:
            trainer.additions.warm_up = HeadWarmUp(
                self.model, head_names(self.model), sequence.head_warmup_share
            )

    def _consolidate(self, trainer: Any, index: int, data: TrainingData) -> EWCState:
        task = self.plan.tasks[index]
        given: dict[str, Any] = {}
        if self.plan.log_likelihood is not None:
            given["log_likelihood"] = self.plan.log_likelihood
        dataset = task.fisher_dataset
        if dataset is None:
            dataset = data.own_part(trainer.train_dataset, index)
        if dataset is None and data.places is not None:
            dataset = task.train_dataset
        if self.plan.sequence.l2sp_lambda and index:
            trainer.ewc_config, trainer.ewc_state = self.plan.config, self.state or EWCState()
        state: EWCState = trainer.consolidate(dataset, name=task.name, weight=task.weight, **given)
        return state

    def _checkpoint(self, trainer: Any) -> str | None:
        """The newest whole checkpoint of the task, None to begin it anew."""
        newest = newest_whole_checkpoint(Path(trainer.args.output_dir))
        if newest is None:
            return None
        if not isinstance(trainer, EWCMixin) and needs_conversion(self.model, newest):
            return None  # a plain Trainer would not load these weights
        return str(newest)

    def _score(self, trainer: Any, index: int) -> None:
        """Enter the scores after this task, on all tasks so far or on all there are."""
        plan, matrix = self.plan, self.record.matrix
        seen = plan.tasks if plan.evaluate_unseen else plan.tasks[: index + 1]
        scores = self._evaluate(trainer, (*seen, *plan.evaluate_also))
        if is_main():
            warn_of_lost(scores, self.record.metrics)
        for task in seen:
            score = score_of(task, scores[task.name])
            if score is not None:
                matrix[index, task.name] = score
        self._score_others(scores, index + 1)
        self.record.metrics.append(scores)
        self._tracker.after_task(scores, matrix)

    def _score_untrained(self, trainer: Any) -> None:
        """Enter the scores before the first task, as far as they are asked for."""
        plan = self.plan
        if plan.evaluate_unseen:
            scores = self._evaluate(trainer, plan.tasks)
            baseline = [score_of(task, scores[task.name]) for task in plan.tasks]
            self.record.matrix.baseline = np.array(baseline, dtype=np.float64)  # None becomes NaN
        self._score_others(self._evaluate(trainer, plan.evaluate_also), 0)

    def _score_others(self, scores: dict[str, Figures], learnt: int) -> None:
        for task in self.plan.evaluate_also:
            score = score_of(task, scores[task.name])
            if score is not None:
                self.record.matrix.set_other(task.name, learnt, score)

    def _evaluate(self, trainer: Any, tasks: Sequence[Task]) -> dict[str, Figures]:
        return evaluate(trainer, tasks, self.plan, self.space, self._collator)

    def _trainer(self, index: int, data: TrainingData) -> Any:
        plan, task = self.plan, self.plan.tasks[index]
        # An accelerator with DeepSpeed is the only one, until its state is reset.
        AcceleratorState._reset_state()
        trainer_class = plan.trainer_class
        if self._adds_to_steps(data):
            trainer_class = sequence_trainer(trainer_class)
        trainer = trainer_class(
            model=self.model,
            args=arguments_of(task, plan.args, index, str(self.folder.task(index))),
            train_dataset=data.dataset,
            eval_dataset=task.eval_dataset,
            data_collator=plan.data_collator,
            compute_metrics=metrics_of(task, plan, self.model),
            **self._protection(index),
            **plan.trainer_kwargs,
        )
        self._collator = trainer.data_collator  # the plan's, or the trainer's default
        trainer.data_collator = task.data_collator or self._collator
        if isinstance(trainer, SequenceMixin):
            trainer.additions = Additions(plan.tasks, self.space)
        return trainer

    def _adds_to_steps(self, data: TrainingData) -> bool:
        sequence = self.plan.sequence
        return bool(data.tagged or sequence.head_warmup_share or sequence.learning_rate_factors)

    def _protection(self, index: int) -> dict[str, Any]:
        """State and settings of the penalty while task `index` trains."""
        config, strength = self.plan.config, self.plan.sequence.l2sp_lambda
        if strength and index:
            state, config = with_l2_sp(
                self.state or EWCState(), config, self.model, strength, set()
            )
            return {"ewc_config": config, "ewc_state": state}
        return {} if config is None else {"ewc_config": config, "ewc_state": self.state}

    def _restore(self) -> None:
        """Take up scores, weights and state of the tasks that are done."""
        self.record.read(self.model)
        done = self.record.done
        if not done:
            return
        folder = self.folder.model(done - 1)
        if is_main():
            logger.warning(
                "%d of %d tasks were done before; going on from %s.",
                done,
                len(self.plan.tasks),
                folder,
            )
        load_weights(self.model, folder)
        if self.plan.config is not None:
            self.state = EWCState.from_pretrained(str(folder))

    def _progress(self) -> AbstractContextManager[TaskProgress | None]:
        """One bar for all tasks, which takes the place of each trainer's own."""
        done, tasks = self.record.done, self.plan.tasks
        if self.plan.args.disable_tqdm or not is_main() or done == len(tasks):
            return nullcontext()
        return closing(TaskProgress([task.name for task in tasks], done, self.plan.method))

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """One run in the trackers of `report_to`, from the first task at work to the last."""
        if self.record.done < len(self.plan.tasks):
            self._tracker = SequenceTracker(self.plan.args, self._is_resumed)
        with closing(self._tracker):
            yield

    def _draw_blueprint(self) -> None:
        if self._blueprint is None:
            with self.space.lifted():
                self._blueprint = Blueprint(unwrap(self.model))

    def _make_whole(self) -> None:
        """Replace a model that FSDP2 has sharded, which cannot be prepared for another trainer."""
        if self._blueprint is None or not any(map(is_dtensor, self.model.parameters())):
            return
        self.model = self._blueprint.built_from(self.model)
        self.space.move_to(self.model)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as it is now, in host memory."""
    state = unwrap(model).state_dict()
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def _check_saves_whole(trainer: Any) -> None:
    kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if "FULL" not in kind:
        raise ValueError(
            f"fsdp_state_dict_type is {kind}; run_tasks needs FULL_STATE_DICT, so that each task's "
            "model is saved whole."
        )
