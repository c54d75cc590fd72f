"""One run over a sequence of tasks: the model as it goes from task to task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import nn
from transformers import ProgressCallback

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.parameters.names import unwrap
from hf_ewc.parameters.sharding import is_dtensor
from hf_ewc.processes import check_launch
from hf_ewc.report import Cost, measured
from hf_ewc.report.results import plain
from hf_ewc.state.by_layer import importance_by_layer
from hf_ewc.state.drift import squared_drift
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.adapting import lacks_adapter
from hf_ewc.tasks.aftermath import aftermath
from hf_ewc.tasks.beginning import Beginning
from hf_ewc.tasks.blueprint import Blueprint, check_saves_whole
from hf_ewc.tasks.checks import check_trains
from hf_ewc.tasks.divergence import Divergence, in_words
from hf_ewc.tasks.evaluation import evaluate, warn_of_lost
from hf_ewc.tasks.fishers import fishers_of
from hf_ewc.tasks.folder_lock import only_run_in
from hf_ewc.tasks.gate import lost, refusal
from hf_ewc.tasks.growth import Growth
from hf_ewc.tasks.history import history_of
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.lambda_search import LambdaSearch
from hf_ewc.tasks.main_process import by_main_process, held_by_main_process, is_main
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.progress import TaskProgress
from hf_ewc.tasks.protection import Protection
from hf_ewc.tasks.record import Record
from hf_ewc.tasks.rehearsal import Rehearsal
from hf_ewc.tasks.results import TaskResults
from hf_ewc.tasks.run_folder import RunFolder
from hf_ewc.tasks.shards import check_shards
from hf_ewc.tasks.task import Figures, Task, score_of
from hf_ewc.tasks.task_training import TaskTraining
from hf_ewc.tasks.tracking import SequenceTracker, reporting
from hf_ewc.tasks.training_data import TrainingData, training_data
from hf_ewc.training.checkpoints import has_optimizer, newest_whole_checkpoint
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
        self.plan, self.model = plan, model
        self.folder = RunFolder(str(plan.args.output_dir), plan.tasks)
        self.record = Record(plan, self.folder, matrix, model, state)
        separated = plan.sequence.separated_softmax
        self.space = LabelSpace(
            model, plan.tasks, plan.args.seed, separated, also=plan.evaluate_also
        )
        self.growth = Growth(plan, model, self.space)
        self.protection = Protection(plan, self.space, model, state)
        self._training = TaskTraining(plan, self.space, self.growth, self.protection, self.folder)
        self._search = LambdaSearch(plan, self.space, self.protection, self._training, self.record)
        self._rehearsal = Rehearsal(plan, self.space)
        self._blueprint: Blueprint | None = None
        self._beginning = Beginning(model) if plan.sequence.joint_training else None
        self._divergence = Divergence(plan, self.space)
        self._kl: dict[str, Any] | None = None
        self._drift: dict[str, float] = {}
        self._lambdas: dict[str, float] = {}
        self._is_resumed = False
        self._integrations = reporting(plan.args)
        self._tracker = SequenceTracker(plan.args)

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
        self.record.begin()

    @property
    def results(self) -> TaskResults:
        """What the run has come to so far."""
        record = self.record
        return TaskResults(
            matrix=record.matrix,
            metrics=record.metrics,
            output_dir=self.folder.path,
            model=self.model,
            state=self.protection.state,
            history=record.history,
            cost=sum(record.costs, Cost()),
            figures=record.figures,
            searches=record.searches,
        )

    def learn_all(self) -> None:
        """Learn the tasks that are not learnt yet."""
        if self.record.done == len(self.plan.tasks):
            by_main_process(self.record.complete)
        by_main_process(self._thin_out)  # an earlier process may have been killed before it
        with self.space, self._progress() as progress, self._tracked():
            self._make_up_for_figures()
            for index in range(self.record.done, len(self.plan.tasks)):
                self._learn(index, progress)

    def _learn(self, index: int, progress: TaskProgress | None) -> None:
        """Train, consolidate and evaluate one task, and save everything."""
        by_main_process(lambda: self.record.begin_task(index))
        with measured() as cost:
            trainer = self._passed(index, progress)
        state = self.protection.state
        self.record.costs.append(cost)
        self.record.history.append(history_of(trainer.state.log_history))
        self.record.steps.append(trainer.state.global_step)
        self.record.importance = None if state is None else importance_by_layer(state)
        self.record.fishers = [] if state is None else fishers_of(state)
        self._tell(index, trainer)
        by_main_process(lambda: self._keep(index))
        self._call_user(trainer, index)
        if index + 1 < len(self.plan.tasks):
            self._make_whole()

    def _tell(self, index: int, trainer: Any) -> None:
        """Say what the task has done to the model, and to those before it if they held it."""
        self.record.divergences += [self._kl] if self._kl is not None else []
        kl = None if self._kl is None else self._kl["kl"]
        if not self._drift:
            if kl is not None and is_main():
                logger.warning("After %r: %s.", self.plan.tasks[index].name, in_words(kl))
            return
        logs = trainer.state.log_history
        found = aftermath(self.record.matrix, index, self._drift, self._lambdas, logs, kl)
        self.record.aftermaths.append(plain(found.to_dict(), []))
        if is_main():
            logger.warning("%s", found.in_words())

    def _measure_drift(self, trainer: Any, index: int) -> None:
        """How far what is protected has moved; not where DeepSpeed holds the weights."""
        config, state = self.protection.settled(index), self.protection.state
        self._drift, self._lambdas = {}, {}
        if config is not None and state and not trainer.is_deepspeed_enabled:
            squares = squared_drift(state, self.model)
            self._drift = squares if np.isfinite(list(squares.values())).all() else {}
            self._lambdas = config.lambdas(state.importance, state.num_tasks)

    def _passed(self, index: int, progress: TaskProgress | None) -> Any:
        """The trainer of the task, saved once no more is lost of earlier ones than allowed.

        Raises:
            ForgettingError: too much was lost by every try.
        """
        sequence, record = self.plan.sequence, self.record
        while len(failed := record.failed(index)) <= sequence.gate_retries:
            factor = sequence.gate_factor ** len(failed)
            trainer = self._learnt(index, progress, factor)
            allowed = sequence.max_forgetting
            found = {} if allowed is None else lost(record.matrix, index, allowed)
            if not found:
                self._save(trainer, index)
                return trainer
            entry = {"allowed": allowed, "factor": factor, "lost": found}
            record.tries.append({"task": self.plan.tasks[index].name, **entry})
            record.take_back(index)
            self._make_whole()
            self._load(index)
            by_main_process(lambda: self._discard(index))
        name = self.plan.tasks[index].name
        raise refusal(name, failed, self.folder.model(index - 1))

    def _discard(self, index: int) -> None:
        self.record.write_results()
        self.folder.remove_model(index)

    def _save(self, trainer: Any, index: int) -> None:
        self._tracker.after_task(self.record.metrics[-1], self.record.matrix)
        trainer.save_model(str(self.folder.model(index)))
        trainer.accelerator.wait_for_everyone()
        by_main_process(lambda: self._save_heads(index))

    def _call_user(self, trainer: Any, index: int) -> None:
        """Let the user's function look at the task, and keep its figures."""
        if self.plan.after_task is None:
            return
        figures = self.plan.after_task(trainer, self.plan.tasks[index], self.results)
        self.record.add_figures(index, figures)
        by_main_process(self.record.write_results)

    def _make_up_for_figures(self) -> None:
        """Call the user's function for a task after which an earlier process was killed."""
        index = self.record.done - 1
        if self.plan.after_task is None or index < 0 or len(self.record.figures) > index:
            return
        self._search.use_found(index)
        self._call_user(self._trainer(index, training_data(self.plan, index, self.space)), index)

    def _learnt(self, index: int, progress: TaskProgress | None, factor: float) -> Any:
        """The trainer that has trained, consolidated and scored the task."""
        if self._beginning is not None and index:
            self._begin_again(self._beginning)
        self.space.put(self.plan.tasks[index])
        check_trains(self.model, self.plan)
        self.growth.begin(index, self.model)
        self.protection.grow(self.model, self.growth.old(index))
        data = training_data(self.plan, index, self.space)
        if data.replayed is not None:
            by_main_process(lambda: self.folder.note_replay(index, data.replayed or {}))
        self._search.find(index, self.model, data)
        trainer = self._trainer(index, data, factor)
        check_shards(trainer, self.plan, self.space)
        if trainer.is_fsdp_enabled:
            check_saves_whole(trainer)
            self._draw_blueprint()
        trainer.remove_callback(ProgressCallback)
        if progress is not None:
            progress.begin(index)
            trainer.add_callback(progress)
        self._tracker.begin(index, sum(self.record.steps))
        trainer.add_callback(self._tracker)
        self._rehearsal.look(trainer, index, self._training.collator)
        if index == 0:
            self._score_untrained(trainer)
        self._divergence.remember(trainer, index)
        self._train(trainer, index, data)
        self._kl = self._divergence.measured(trainer, index)
        self._score(trainer, index)
        return trainer

    def _save_heads(self, index: int) -> None:
        if self.space.heads is not None:
            self.space.heads.save(self.folder.model(index))
            self.protection.save_heads(self.folder.model(index))

    def _keep(self, index: int) -> None:
        self.record.note_weights(index)
        self.record.write()
        self._thin_out()

    def _thin_out(self) -> None:
        """Remove what is not to be kept of earlier tasks."""
        if self.plan.sequence.keep_models == "last":
            for earlier in range(self.record.done - 1):
                self.folder.remove_model(earlier)

    def _begin_again(self, beginning: Beginning) -> None:
        """Put the model back to where the first task began."""
        if self.space.heads is not None:
            self.space.heads.begin_again()
        self.growth.begin_again(self.model)
        beginning.restore(self.model)

    def _train(self, trainer: Any, index: int, data: TrainingData) -> None:
        """Train the task as the plan asks, and fold it into the state."""
        plan = self.plan
        mean = self._training.train(trainer, index, data, self._checkpoint(trainer))
        with self.space.of(self.growth.views(index)[index], plan.mask_training):
            if mean is not None:
                with self._training.all_heads(data):
                    mean.apply(self.model)
            self.growth.finish(trainer, index, data, self._training.collator)
            self._measure_drift(trainer, index)
            if plan.config is not None:
                self.protection.consolidate(trainer, index, data)
            if plan.sequence.weight_average == "fisher" and index:
                trainer.ewc_state.merge(self.model)

    def _checkpoint(self, trainer: Any) -> str | None:
        """The newest whole checkpoint of the task, None to begin it anew."""
        newest = newest_whole_checkpoint(Path(trainer.args.output_dir))
        if newest is None:
            return None
        if not has_optimizer(newest):
            if is_main():
                logger.warning(
                    "%s has no state of an optimizer, as with save_only_model, and cannot be gone "
                    "on from: the task begins anew.",
                    newest,
                )
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
        return evaluate(trainer, tasks, self.plan, self.space, self._training.collator)

    def _trainer(self, index: int, data: TrainingData, factor: float = 1.0) -> Any:
        given = self.protection.given(index, self.model, factor)
        trainer = self._training.trainer(self.model, index, data, given)
        if unwrap(trainer.model) is not unwrap(self.model):
            self._go_on_with(trainer.model)
        return trainer

    def _go_on_with(self, model: nn.Module) -> None:
        """Take over what a trainer has made of the model, such as one with an adapter."""
        self.model = model
        self.space.move_to(model)
        if self._beginning is not None:
            self._beginning = Beginning(model)

    def _restore(self) -> None:
        """Take up scores, weights and state of the tasks that are done."""
        self.record.read()
        done = self.record.done
        if not done:
            return
        if is_main():
            logger.warning(
                "%d of %d tasks were done before; going on from %s.",
                done,
                len(self.plan.tasks),
                self.folder.model(done - 1),
            )
        self._load(done)

    def _load(self, done: int) -> None:
        """Weights and state as they were after so many tasks, at least one."""
        folder = self.folder.model(done - 1)
        by_main_process(lambda: self.record.check_weights(done - 1))
        if self.space.heads is not None:
            self.space.heads.begin_again()  # those that no file has
        self.space.put(self.plan.tasks[done - 1])
        self.growth.begin(done - 1, self.model)
        if lacks_adapter(self.model, self.plan):  # which the trainer of the first task has made
            self._trainer(0, training_data(self.plan, 0, self.space))
        load_weights(self.model, folder)
        if self.space.heads is not None and any(t.head for t in self.plan.tasks[:done]):
            self.space.heads.load(folder)
        self.protection.load(folder, self.model)

    def _progress(self) -> AbstractContextManager[TaskProgress | None]:
        """One bar for all tasks, which takes the place of each trainer's own."""
        done, tasks = self.record.done, self.plan.tasks
        if self.plan.args.disable_tqdm or not is_main() or done == len(tasks):
            return nullcontext()
        label = self.plan.args.run_name or self.plan.method
        return closing(TaskProgress([task.name for task in tasks], done, label))

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """One run in the trackers of `report_to`, from the first task at work to the last."""
        if self.record.done < len(self.plan.tasks):
            self._tracker = SequenceTracker(self.plan.args, self._is_resumed, self._integrations)
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
