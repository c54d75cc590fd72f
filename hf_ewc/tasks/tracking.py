"""One run in the user's experiment tracker for a whole sequence of tasks."""

from __future__ import annotations

import copy
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from hf_ewc.files import write_atomically
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.tasks.task import Figures

FILE = "tracking.json"
logger = logging.getLogger("hf_ewc")


def reporting(args: TrainingArguments) -> list[TrainerCallback]:
    """What reports to the trackers that `report_to` names.

    Raises:
        ValueError: one is not installed, or not known.
    """
    try:
        return [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(
            f"report_to is {args.report_to}: {' '.join(str(error).split())} Or give another, such "
            "as report_to='none'."
        ) from error


class SequenceTracker(TrainerCallback):
    """Hands the logs of each task's trainer on to `report_to`, as the logs of one run.

    The step axis goes on from task to task: a task's steps are counted behind those of the tasks
    before it, and `task` tells its number. A run that goes on after a kill is the same one. What
    fails once a task is trained is a warning: the task is not lost for it.

    Args:
        args: of the whole run, whose `report_to`, `output_dir` and `run_name` count.
        is_resumed: whether the run was begun by an earlier process.
        integrations: what reports; see `reporting`.
    """

    def __init__(
        self,
        args: TrainingArguments,
        is_resumed: bool = False,
        integrations: Sequence[TrainerCallback] = (),
    ) -> None:
        self.integrations = list(integrations)
        self.args = copy.copy(args)
        self._is_resumed = is_resumed
        self._before, self._task = 0, 0
        self._is_open = self._is_trained = False
        self._last: tuple[TrainerState, TrainerControl, dict[str, Any]] | None = None
        self._own_runs: list[Any] = []

    def begin(self, index: int, steps_before: int) -> None:
        """Count from here the steps of this task, behind so many of the tasks before it."""
        self._task, self._before = index + 1, steps_before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The first trainer opens the run; later ones go on in it."""
        self._is_trained = False
        self._open(state, control, given)

    def _open(self, state: TrainerState, control: TrainerControl, given: dict[str, Any]) -> None:
        self._last = (state, control, given)
        if self._is_open:
            return
        self._is_open = True
        if self.integrations and state.is_world_process_zero:
            self._name_run()
        for integration in self.integrations:
            integration.on_init_end(self.args, state, control, **given)
            integration.on_train_begin(self.args, self._shifted(state), control, **given)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The run stays open for the tasks to come, until `close`."""
        self._is_trained = True
        self._last = (state, control, given)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Log at the run's step, with the number of the task."""
        self._open(state, control, given)
        found = {**(logs or {}), "task": self._task}
        for integration in self.integrations:
            with self._warning() if self._is_trained else nullcontext():
                integration.on_log(self.args, self._shifted(state), control, logs=found, **given)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        # With the task's own arguments and steps, by which the checkpoint is found.
        for integration in self.integrations:
            integration.on_save(args, state, control, **given)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        for integration in self.integrations:
            integration.on_step_end(self.args, self._shifted(state), control, **given)

    def after_task(self, scores: Mapping[str, Figures], matrix: AccuracyMatrix) -> None:
        """Report `task/<name>/<figure>` for the tasks evaluated, and the measures so far."""
        if self._last is None or not self._last[0].is_world_process_zero:
            return
        state, control, given = self._last
        figures = figures_after(scores, matrix)
        for integration in self.integrations:
            with self._warning():
                _report(integration, figures, (self.args, self._shifted(state), control, given))

    def close(self) -> None:
        """End the run, once all tasks are learnt or an error ends them."""
        if self._last is None or not self._is_open:
            return
        state, control, given = self._last
        for integration in self.integrations:
            with self._warning():
                integration.on_train_end(self.args, self._shifted(state), control, **given)
        for library in self._own_runs:
            with self._warning():
                library.finish()
        self._last, self._is_open, self._own_runs = None, False, []

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """An error of what reports is a warning inside: the results hold what it was to report."""
        try:
            yield
        except Exception as error:
            logger.warning(
                "A tracker of report_to failed (%s: %.300s); results.json has what it was told.",
                type(error).__name__,
                error,
            )

    def _shifted(self, state: TrainerState) -> TrainerState:
        """The trainer's state as seen from the whole run."""
        found = copy.copy(state)
        found.global_step += self._before
        return found

    def _name_run(self) -> None:
        """Let a run that goes on be found again: by its folder in TensorBoard, else by its name."""
        folder = Path(str(self.args.output_dir)).absolute()
        name = _identifier(folder, self._is_resumed)
        if self.args.run_name is None:
            self.args.run_name = name
        for integration in self.integrations:
            if getattr(integration, "logging_dir", name) is None:
                setattr(integration, "logging_dir", str(folder / "runs" / name))  # noqa: B010
            library = getattr(integration, "_wandb", None)
            if library is not None and getattr(library, "run", None) is None:
                self._own_runs.append(library)
                library.init(
                    project=os.getenv("WANDB_PROJECT", "huggingface"),
                    name=self.args.run_name,
                    id=os.getenv("WANDB_RUN_ID", name),
                    resume="allow",
                )


def figures_after(scores: Mapping[str, Figures], matrix: AccuracyMatrix) -> dict[str, float]:
    """What is reported after a task; figures that are no numbers are left out.

    Where lower is better for all tasks, averages are of their figures: `average_loss`.
    """
    found = {
        f"task/{task}/{name}": value
        for task, figures in scores.items()
        for name, value in figures.items()
        if value is not None
    }
    kinds = {matrix.lower_is_better.get(task) for task in matrix.tasks}
    figure = kinds.pop() if len(kinds) == 1 else None
    for name, value in matrix.summary().items():
        is_level = name in ("average_accuracy", "learning_accuracy")
        if is_level and figure is not None:
            found[name.replace("accuracy", figure)] = -value
        elif not is_level or not kinds:
            found[name] = value
    return found


def _report(integration: Any, figures: Mapping[str, float], context: tuple[Any, ...]) -> None:
    """Figures under their own names; by `on_log`, with its prefix, where no other way is known."""
    args, state, control, given = context
    writer = getattr(integration, "tb_writer", None)
    library = getattr(integration, "_wandb", None) or getattr(integration, "_trackio", None)
    if writer is not None:
        for name, value in figures.items():
            writer.add_scalar(name, value, state.global_step)
        writer.flush()
    elif library is not None:
        library.log({**figures, "train/global_step": state.global_step})
    else:
        integration.on_log(args, state, control, logs=dict(figures), **given)


def _identifier(folder: Path, is_resumed: bool) -> str:
    """What names the run in trackers: its folder's name and eight digits, kept in the folder."""
    file = folder / FILE
    if is_resumed:
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["run"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # begun without a tracker
    name = f"{folder.absolute().name}-{uuid.uuid4().hex[:8]}"
    write_atomically(file, json.dumps({"run": name}) + "\n")
    return name
