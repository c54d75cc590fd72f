"""The runner over a sequence of tasks, which trains, tests and remembers."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn
from transformers import ProgressCallback, TrainingArguments, set_seed

from hf_ewc.config import EWCConfig
from hf_ewc.fisher.likelihood.outputs import shifts_labels
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.parameters.names import class_name, unwrap
from hf_ewc.parameters.sharding import is_dtensor, whole_shape
from hf_ewc.processes import check_launch
from hf_ewc.report import read_results, write_report, write_results
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.blueprint import Blueprint
from hf_ewc.tasks.class_mask import ClassMask
from hf_ewc.tasks.evaluation import accuracy
from hf_ewc.tasks.progress import TaskProgress
from hf_ewc.tasks.same_run import RECORDED, check_same_run, length, qualified_name
from hf_ewc.tasks.scenario import CLASS_INCREMENTAL, guess_scenario
from hf_ewc.tasks.task import Metrics, Task, check_score, check_tasks, check_types, score_of
from hf_ewc.training.checkpoints import is_complete
from hf_ewc.training.converted_weights import load_converted, needs_conversion
from hf_ewc.training.trainer import EWCMixin, EWCTrainer

logger = logging.getLogger("hf_ewc")


@dataclass
class TaskResults:
    """What `run_tasks` returns.

    Attributes:
        matrix: R[i, j], the score on task j after training task i.
        metrics: everything evaluation gave, `metrics[i][name]` after training task i.
        output_dir: where results.json, report.md, the plots and each task's model are.
        model: the model after the last task.
        state: the EWC state after the last task, None without EWC.
    """

    matrix: AccuracyMatrix
    metrics: list[dict[str, dict[str, float]]]
    output_dir: Path
    model: nn.Module
    state: EWCState | None = None


def run_tasks(
    model: nn.Module,
    tasks: Sequence[Task],
    args: TrainingArguments,
    ewc_config: EWCConfig | None = None,
    *,
    trainer_class: type[Any] = EWCTrainer,
    ewc_state: EWCState | str | None = None,
    data_collator: Callable[..., Any] | None = None,
    compute_metrics: Metrics | None = None,
    mask_training: bool = True,
    evaluate_unseen: bool = False,
    joint: Sequence[float] | Mapping[str, float] | None = None,
    scenario: str | None = None,
    resume: bool = True,
    **trainer_kwargs: Any,
) -> TaskResults:
    """Train on one task after another, testing all that were seen after each, and keep the results.

    For each task: a trainer with `args`, `train()`, `evaluate` on every task so far,
    `consolidate()`; then model, state and results are saved. After a crash or a kill at any moment
    the same call goes on: with the last whole checkpoint that `args.save_strategy` left inside the
    task, or with the task's beginning, and ends with the same weights and results; with further
    tasks behind those of an earlier call it goes on with these. Task k trains with the seed
    `args.seed + k`, counted from 0.

    Args:
        model: trained in place (under FSDP2 a new one for each further task: see the result's); to
            go on, give it as it was at first.
        tasks: in the order of training.
        args: for every task; `args.output_dir` holds the run, with a folder for each task.
        ewc_config: None trains plainly, for comparison.
        trainer_class: any Trainer; with `ewc_config` an `EWCMixin` one.
        ewc_state: what protects the model already during the first task.
        data_collator: for the tasks that have none.
        compute_metrics: for the tasks that have none; the default is accuracy, labels of -100 left
            out.
        mask_training: whether training and Fisher, too, see only the task's own classes.
        evaluate_unseen: score the tasks to come as well, and the untrained model, which forward
            transfer needs.
        joint: scores by task of a model trained jointly, which intransigence needs.
        scenario: "task", "domain" or "class"; None looks at `classes` and the labels.
        resume: False begins anew and removes what an earlier run left for these tasks.
        trainer_kwargs: for the trainer's constructor, such as `callbacks` or `processing_class`.

    Raises:
        ValueError: no tasks, names that repeat, labels outside a task's classes, a metric that
            evaluation did not return, an output folder that holds a different run, or fewer
            processes than were asked for.
        TypeError: an argument of another type, or `ewc_config` is given and `trainer_class` cannot
            consolidate.
    """
    check_types(tasks, args, ewc_config)
    check_tasks(tasks, args, ewc_config, trainer_class, scenario)
    for task in tasks:
        check_score(task, task.compute_metrics or compute_metrics)
    if ewc_state is not None and ewc_config is None:
        raise ValueError("run_tasks got an ewc_state without ewc_config; give both, or neither.")
    run = _Run(
        model=model,
        tasks=list(tasks),
        args=args,
        config=ewc_config,
        trainer_class=trainer_class,
        state=EWCState.from_pretrained(ewc_state) if isinstance(ewc_state, str) else ewc_state,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
        mask_training=mask_training,
        evaluate_unseen=evaluate_unseen,
        scenario=scenario or guess_scenario([(t.train_dataset, t.classes) for t in tasks]),
        trainer_kwargs=trainer_kwargs,
        matrix=AccuracyMatrix([task.name for task in tasks], joint=joint),
    )
    if run.scenario == "class":
        logger.warning(CLASS_INCREMENTAL)
    run.start(resume)
    with run.mask or nullcontext(), run.progress() as progress:
        for index in range(len(run.metrics), len(tasks)):
            run.learn(index, progress)
    return TaskResults(run.matrix, run.metrics, run.folder, run.model, run.state)


@dataclass
class _Run:
    """A run over the tasks, as far as it has come."""

    model: nn.Module
    tasks: list[Task]
    args: TrainingArguments
    config: EWCConfig | None
    trainer_class: type[Any]
    state: EWCState | None
    data_collator: Callable[..., Any] | None
    compute_metrics: Metrics | None
    mask_training: bool
    evaluate_unseen: bool
    scenario: str
    trainer_kwargs: dict[str, Any]
    matrix: AccuracyMatrix
    metrics: list[dict[str, dict[str, float]]] = field(default_factory=list)
    mask: ClassMask | None = None
    blueprint: Blueprint | None = None

    def __post_init__(self) -> None:
        self.folder = Path(str(self.args.output_dir))
        self.results = self.folder / "results.json"
        if any(task.classes is not None for task in self.tasks):
            self.mask = ClassMask(self.model)
            for task in self.tasks:
                if task.classes is not None:
                    self.mask.check(task.classes)

    def start(self, resume: bool) -> None:
        """Go on from what results.json records, or make the folder ready for a new run."""
        _ = self.args.device  # sets up the process group, if there is to be one
        check_launch(PartialState().num_processes)
        found = resume and self.results.exists()
        if found:
            self._restore()
        # Everyone has looked before anyone writes.
        PartialState().wait_for_everyone()
        if not found and self._is_main:
            for index in range(len(self.tasks)):
                shutil.rmtree(self._task_folder(index), ignore_errors=True)
            write_results(self.results, {self._method: [self.matrix]}, self._details())
        PartialState().wait_for_everyone()

    def progress(self) -> AbstractContextManager[TaskProgress | None]:
        """One bar for all tasks, which takes the place of each trainer's own."""
        if self.args.disable_tqdm or not self._is_main or len(self.metrics) == len(self.tasks):
            return nullcontext()
        names = [task.name for task in self.tasks]
        return closing(TaskProgress(names, len(self.metrics), self._method))

    def learn(self, index: int, progress: TaskProgress | None = None) -> None:
        """Train, consolidate and evaluate one task, and save everything."""
        task = self.tasks[index]
        trainer = self._trainer(index)
        if trainer.is_fsdp_enabled:
            _check_saves_whole(trainer)
            self._draw_blueprint()
        trainer.remove_callback(ProgressCallback)
        if progress is not None:
            progress.begin(index)
            trainer.add_callback(progress)
        if index == 0 and self.evaluate_unseen:
            scores = self._evaluate(trainer, self.tasks)
            self.matrix.baseline = np.array([score_of(t, scores[t.name]) for t in self.tasks])
        with self._classes(task if self.mask_training else None):
            set_seed(trainer.args.seed)
            trainer.train(resume_from_checkpoint=self._last_checkpoint(trainer))
            if self.config is not None:
                self.state = trainer.consolidate(name=task.name)
        seen = self.tasks if self.evaluate_unseen else self.tasks[: index + 1]
        scores = self._evaluate(trainer, seen)
        for other in seen:
            self.matrix[task.name, other.name] = score_of(other, scores[other.name])
        self.metrics.append(scores)
        trainer.save_model(str(self._model_folder(index)))
        trainer.accelerator.wait_for_everyone()
        if self._is_main:
            self._report()
        trainer.accelerator.wait_for_everyone()
        if index + 1 < len(self.tasks):
            self._make_whole()

    def _draw_blueprint(self) -> None:
        if self.blueprint is None:
            with self.mask.lifted() if self.mask is not None else nullcontext():
                self.blueprint = Blueprint(unwrap(self.model))

    def _make_whole(self) -> None:
        """Replace a model that FSDP2 has sharded, which cannot be prepared for another trainer."""
        if self.blueprint is None or not any(map(is_dtensor, self.model.parameters())):
            return
        self.model = self.blueprint.built_from(self.model)
        if self.mask is not None:
            self.mask.move_to(self.model)

    def _trainer(self, index: int) -> Any:
        task = self.tasks[index]
        args = copy.copy(self.args)
        args.output_dir = str(self._task_folder(index))
        args.seed = self.args.seed + index
        # An accelerator with DeepSpeed is the only one, until its state is reset.
        AcceleratorState._reset_state()
        ewc = {}
        if self.config is not None:
            ewc = {"ewc_config": self.config, "ewc_state": self.state}
        return self.trainer_class(
            model=self.model,
            args=args,
            train_dataset=task.train_dataset,
            eval_dataset=task.eval_dataset,
            data_collator=task.data_collator or self.data_collator,
            compute_metrics=self._metrics_of(task),
            **ewc,
            **self.trainer_kwargs,
        )

    def _evaluate(self, trainer: Any, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
        """The metrics on each task's evaluation data, each with its own classes and collator."""
        own = trainer.data_collator, trainer.compute_metrics
        found = {}
        for task in tasks:
            trainer.data_collator = task.data_collator or self.data_collator or own[0]
            trainer.compute_metrics = self._metrics_of(task)
            prefix = f"eval_{task.name}"
            with self._classes(task):
                metrics = trainer.evaluate(task.eval_dataset, metric_key_prefix=prefix)
            found[task.name] = {
                key.removeprefix(f"{prefix}_"): float(value)
                for key, value in metrics.items()
                if key.startswith(prefix)
                and not key.endswith(("_runtime", "_per_second"))
                and np.ndim(value) == 0
                and isinstance(value, (int, float, np.number))
            }
        trainer.data_collator, trainer.compute_metrics = own
        return found

    def _metrics_of(self, task: Task) -> Metrics | None:
        given = task.compute_metrics or self.compute_metrics
        if given is not None or task.metric != "accuracy":
            return given
        return partial(accuracy, shifted=bool(shifts_labels(unwrap(self.model))))

    def _classes(self, task: Task | None) -> AbstractContextManager[None]:
        if self.mask is None:
            return nullcontext()
        return self.mask.only(task.classes if task is not None else None)

    def _last_checkpoint(self, trainer: Any) -> str | None:
        """The newest whole checkpoint of the task, None to begin it anew."""
        found = {
            int(path.name.split("-")[1]): path
            for path in Path(trainer.args.output_dir).glob("checkpoint-*[0-9]")
            if is_complete(path)
        }
        if not found:
            return None
        newest = found[max(found)]
        if not isinstance(trainer, EWCMixin) and needs_conversion(self.model, newest):
            return None  # a plain Trainer would not load these weights
        return str(newest)

    def _restore(self) -> None:
        """Take up matrix, weights and state of the tasks that are done."""
        runs, content = read_results(self.results)
        check_same_run(self.results, content.get("settings"), self._settings)
        (saved,) = runs[self._method]
        self.matrix.take_over(saved)
        self.metrics = content["metrics"]
        done = len(self.metrics)
        if not done:
            return
        folder = self._model_folder(done - 1)
        if self._is_main:
            logger.warning(
                "%d of %d tasks were done before; going on from %s.", done, len(self.tasks), folder
            )
        if not load_converted(self.model, folder):
            trainer = self._trainer(done - 1)
            trainer.is_fsdp_enabled = False  # the model is whole yet, and so is what was saved
            trainer._load_from_checkpoint(str(folder))
        if self.config is not None:
            self.state = EWCState.from_pretrained(str(folder))

    def _report(self) -> None:
        args, config = self.args, self.config
        notes = [
            f"{len(self.metrics)} of {len(self.tasks)} tasks learnt; {self.scenario}-incremental; "
            f"{class_name(self.model)}, learning rate {args.learning_rate:g}, "
            f"seed {args.seed}."
        ]
        if config is not None:
            notes.append(config.summary())
        if self.scenario == "class":
            notes.append(f"**{CLASS_INCREMENTAL}**")
        # results.json goes last: what it records is there in full.
        write_report(
            self.folder,
            {self._method: [self.matrix]},
            title="Continual learning",
            notes=notes,
            details=self._details(),
        )

    def _details(self) -> dict[str, Any]:
        return {"scenario": self.scenario, "settings": self._settings, "metrics": self.metrics}

    @property
    def _settings(self) -> dict[str, Any]:
        """What has to be the same for one run to go on from another, in JSON's types."""
        settings = {
            "trainer": self.trainer_class.__name__,
            "model": [
                class_name(self.model),
                sum(whole_shape(p).numel() for p in self.model.parameters()),
            ],
            "tasks": [
                {
                    "name": task.name,
                    "classes": None if task.classes is None else [int(c) for c in task.classes],
                    "metric": task.metric,
                    "compute_metrics": qualified_name(self._metrics_of(task)),
                    "examples": [length(task.train_dataset), length(task.eval_dataset)],
                }
                for task in self.tasks
            ],
            "mask_training": self.mask_training,
            "evaluate_unseen": self.evaluate_unseen,
            "ewc_config": None if self.config is None else asdict(self.config),
            "args": {name: getattr(self.args, name, None) for name in RECORDED},
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    @property
    def _method(self) -> str:
        return "plain" if self.config is None else "EWC"

    @property
    def _is_main(self) -> bool:
        return bool(PartialState().is_main_process)

    def _task_folder(self, index: int) -> Path:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", self.tasks[index].name).strip("-.") or "task"
        return self.folder / f"{index + 1:02d}-{safe}"

    def _model_folder(self, index: int) -> Path:
        return self._task_folder(index) / "final"


def _check_saves_whole(trainer: Any) -> None:
    kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if "FULL" not in kind:
        raise ValueError(
            f"fsdp_state_dict_type is {kind}; run_tasks needs FULL_STATE_DICT, so that each task's "
            "model is saved whole."
        )
