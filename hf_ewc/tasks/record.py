"""What a run over tasks writes down: the report, and the settings and scores it may go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_ewc.files import write_atomically
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.parameters.names import class_name
from hf_ewc.report import (
    Cost,
    LayerImportance,
    Outcome,
    read_outcomes,
    write_pages,
    write_report,
    write_results,
)
from hf_ewc.report.names import in_markdown
from hf_ewc.report.outcome import as_runs
from hf_ewc.report.results import plain
from hf_ewc.report.writing import pictures_of
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.aftermath import Aftermath
from hf_ewc.tasks.divergence import divergence_table
from hf_ewc.tasks.fishers import fisher_table
from hf_ewc.tasks.history import Entry
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.run_folder import RunFolder
from hf_ewc.tasks.same_run import check_same_run, settings_of
from hf_ewc.tasks.scenario import CLASS_INCREMENTAL
from hf_ewc.tasks.task import Figures
from hf_ewc.training.lambda_curve import LambdaCurve

WORTH_A_REPORT = 60.0  # seconds of a task, after which its report is worth a second's drawing
Scores = list[dict[str, Figures]]


class Record:
    """The scores of a run so far, and their place on disk.

    Args:
        plan: of the run; its settings are written with the scores.
        folder: of the run.
        matrix: R[i, j], filled as tasks are learnt.
        model, state: as they are before the first task.

    Attributes:
        metrics: everything evaluation gave, `metrics[i][name]` after training task i.
        history: what was logged while training task i, `history[i]`.
        costs: of each task; kept in a file of their own, since a run that goes on after a kill has
            the same results, not the same seconds.
        steps: the optimizer steps of each task.
        figures: what the user's `after_task` returned after each task.
        tries: of the gate: tasks after which too much was lost, with what was.
        searches: what was tried to find λ before each task, where it is looked for.
        fishers: what the Fisher of each task was, in JSON's types.
        aftermaths: what each task has done to the earlier ones, in JSON's types.
        weights: SHA-256 of the files of weights after each task, by its folder's name.
        divergences: KL(before ‖ after) of each task on its own data, where that is asked for.
        importance: Σ F by layer in the state after the last task, where a process holds it whole.
        begun: how many tasks this run has begun; None where an earlier version did not write it.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        matrix: AccuracyMatrix,
        model: nn.Module,
        state: EWCState | None = None,
    ) -> None:
        self.plan, self.folder, self.matrix = plan, folder, matrix
        self._settings, self._model = settings_of(plan, model, state), class_name(model)
        self.metrics: Scores = []
        self.history: list[list[Entry]] = []
        self.costs: list[Cost] = []
        self.steps: list[int] = []
        self.figures: list[dict[str, Any]] = []
        self.tries: list[dict[str, Any]] = []
        self.searches: list[LambdaCurve] = []
        self.fishers: list[dict[str, Any]] = []
        self.aftermaths: list[dict[str, Any]] = []
        self.divergences: list[dict[str, Any]] = []
        self.weights: dict[str, dict[str, str]] = {}
        self.importance: Mapping[str, LayerImportance] | None = None
        self.begun: int | None = 0

    @property
    def done(self) -> int:
        """How many tasks are learnt."""
        return len(self.metrics)

    def read(self) -> None:
        """Take up the scores of the tasks that are done.

        Raises:
            ValueError: they are of a run with other settings.
        """
        path = self.folder.results
        runs, content = read_outcomes(path)
        if "settings" not in content:
            raise ValueError(
                f"{path} is of no run by run_tasks, but a comparison of {', '.join([*runs][:5])}; "
                "choose another output_dir."
            )
        begins = self._begins_from_the_model(len(content["metrics"]))
        check_same_run(path, content.get("settings"), self._settings, begins)
        (saved,) = runs[self.plan.method].values()
        self.matrix.take_over(saved.matrix)
        self.importance = saved.importance
        self.searches = [LambdaCurve.from_dict(search) for search in saved.searches]
        self.metrics = content["metrics"]
        self.history = content.get("history", [])
        self.costs = self._read_costs()[: self.done]
        self.steps = content.get("steps", [])
        self.figures = content.get("figures", [])
        self.tries = content.get("tries", [])
        self.fishers = content.get("fishers", [])
        self.aftermaths = content.get("aftermaths", [])
        self.divergences = content.get("divergences", [])
        self.weights = content.get("weights", {})
        self.begun = content.get("begun")
        self.folder.saved = content.get("saved", {})

    def _begins_from_the_model(self, done: int) -> bool:
        """Whether weights that are not saved yet are still to be trained on."""
        if self.plan.sequence.joint_training:  # each task does
            return done < len(self.plan.tasks)
        return not done and not self.folder.has_checkpoint(0)

    def failed(self, index: int) -> list[dict[str, Any]]:
        """The tries of task `index` that did not pass the gate as it is set now."""
        name, allowed = self.plan.tasks[index].name, self.plan.sequence.max_forgetting
        return [t for t in self.tries if (t["task"], t["allowed"]) == (name, allowed)]

    def keep_search(self, curve: LambdaCurve) -> None:
        """Keep what is known now of the search for a task's λ."""
        others = [known for known in self.searches if known.task != curve.task]
        self.searches = [*others, curve]

    def note_weights(self, index: int) -> None:
        """Keep what the weights are after task `index`."""
        self.weights[self.folder.task(index).name] = self.folder.hashes(index)
        self.folder.note_saved(index)

    def check_weights(self, index: int) -> None:
        """Refuse weights after task `index` that are not those that were noted: a `ValueError`."""
        known = self.weights.get(self.folder.task(index).name, {})  # earlier versions kept none
        self.folder.check_weights(index, known)

    def take_back(self, index: int) -> None:
        """Forget the scores after task `index`, the last one."""
        self.metrics.pop()
        self.matrix.scores[index] = np.nan
        for scores in self.matrix.others.values():
            scores[index + 1] = np.nan

    def add_figures(self, index: int, figures: Any) -> None:
        """Keep what `after_task` returned after task `index`.

        Raises:
            TypeError: it is no dict of what JSON holds.
        """
        if not isinstance(figures, (Mapping, type(None))):
            raise TypeError(
                f"after_task returned a {type(figures).__name__}; a dict of figures, or None, can "
                "be kept."
            )
        self.figures += [{}] * (index - len(self.figures))
        self.figures.append(plain(figures or {}, []))

    def begin(self) -> None:
        """Write that nothing is learnt yet."""
        self.write_results()

    def begin_task(self, index: int) -> None:
        """Write that task `index` is begun; what lies in its folder then is another run's.

        Raises:
            ValueError: there are files of an earlier run.
        """
        if self.begun is None or index < self.begun:
            return
        self.folder.refuse_earlier(index)
        self.begun = index + 1
        self.write_results()

    def write(self) -> None:
        """Write results.json, and the report after the last task or one that took its time.

        Pictures take longer than a small task; if they fail, it is a warning.
        """
        costs = json.dumps([asdict(cost) for cost in self.costs], indent=2)
        write_atomically(self._costs_file, costs + "\n")
        if self.done < len(self.plan.tasks) and self.costs[-1].seconds < WORTH_A_REPORT:
            self.write_results()
            return
        notes, details = self._notes(), self._details()
        write_report(self.folder.path, self._runs(), notes=notes, details=details)

    def complete(self) -> None:
        """Make the report of results that are there, if a kill came before its last picture."""
        runs = as_runs(self._runs())
        written = self.folder.results.stat().st_mtime_ns
        pages = [self.folder.path / name for name in ("report.md", *pictures_of(runs))]
        if any(not page.exists() or page.stat().st_mtime_ns < written for page in pages):
            write_pages(self.folder.path, runs, notes=self._notes())

    def write_results(self) -> None:
        """Write results.json alone."""
        write_results(self.folder.results, self._runs(), self._details())

    def _runs(self) -> dict[str, dict[int, Outcome]]:
        searches = tuple(curve.to_dict() for curve in self.searches)
        outcome = Outcome(self.matrix, importance=self.importance, searches=searches)
        return {self.plan.method: {self.plan.args.seed: outcome}}

    @property
    def _costs_file(self) -> Path:
        return self.folder.path / "costs.json"

    def _read_costs(self) -> list[Cost]:
        try:
            costs = [Cost(**cost) for cost in json.loads(self._costs_file.read_text())]
            return costs if sum(costs, Cost()).seconds >= 0.0 else []
        except (OSError, ValueError, TypeError, RecursionError):
            return []  # no result depends on them

    def _notes(self) -> list[str]:
        plan = self.plan
        notes = [
            f"{self.done} of {len(plan.tasks)} tasks learnt; {plan.scenario}-incremental; "
            f"{self._model}, learning rate {plan.args.learning_rate:g}, "
            f"seed {plan.args.seed}."
        ]
        if plan.config is not None:
            notes.append(plan.config.summary())
        if plan.sequence.changes():
            notes.append(f"Sequence: {plan.sequence.summary()}.")
        if plan.scenario == "class":
            notes.append(f"**{CLASS_INCREMENTAL}**")
        lines = [f"- {in_markdown(Aftermath(**found).in_words())}" for found in self.aftermaths]
        notes += ["\n".join(lines)] if lines else []
        notes += [fisher_table(self.fishers)] if self.fishers else []
        notes += [divergence_table(self.divergences)] if self.divergences else []
        return notes

    def _details(self) -> Mapping[str, Any]:
        return {
            "scenario": self.plan.scenario,
            "settings": self._settings,
            "metrics": self.metrics,
            "history": self.history,
            "steps": self.steps,
            "weights": self.weights,
            "saved": self.folder.saved,
            **({"begun": self.begun} if self.begun is not None else {}),
            **({"figures": self.figures} if self.plan.after_task is not None else {}),
            **({"tries": self.tries} if self.tries else {}),
            **({"fishers": self.fishers} if self.fishers else {}),
            **({"aftermaths": self.aftermaths} if self.aftermaths else {}),
            **({"divergences": self.divergences} if self.divergences else {}),
        }
