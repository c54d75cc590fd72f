"""What a run over tasks writes down: the report, and the settings and scores it may go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from hf_ewc.tasks.history import Entry
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.run_folder import RunFolder
from hf_ewc.tasks.same_run import check_same_run, settings_of
from hf_ewc.tasks.scenario import CLASS_INCREMENTAL
from hf_ewc.tasks.task import Figures

WORTH_A_REPORT = 60.0  # seconds of a task, after which its report is worth a second's drawing
Scores = list[dict[str, Figures]]


class Record:
    """The scores of a run so far, and their place on disk.

    Args:
        plan: of the run; its settings are written with the scores.
        folder: of the run.
        matrix: R[i, j], filled as tasks are learnt.

    Attributes:
        metrics: everything evaluation gave, `metrics[i][name]` after training task i.
        history: what was logged while training task i, `history[i]`.
        costs: of each task; kept in a file of their own, since a run that goes on after a kill has
            the same results, not the same seconds.
        steps: the optimizer steps of each task.
        importance: Σ F by layer in the state after the last task, where a process holds it whole.
    """

    def __init__(self, plan: Plan, folder: RunFolder, matrix: AccuracyMatrix) -> None:
        self.plan, self.folder, self.matrix = plan, folder, matrix
        self.metrics: Scores = []
        self.history: list[list[Entry]] = []
        self.costs: list[Cost] = []
        self.steps: list[int] = []
        self.importance: Mapping[str, LayerImportance] | None = None

    @property
    def done(self) -> int:
        """How many tasks are learnt."""
        return len(self.metrics)

    def read(self, model: nn.Module) -> None:
        """Take up the scores of the tasks that are done.

        Raises:
            ValueError: they are of a run with other settings.
        """
        path = self.folder.results
        runs, content = read_outcomes(path)
        check_same_run(path, content.get("settings"), settings_of(self.plan, model))
        (saved,) = runs[self.plan.method].values()
        self.matrix.take_over(saved.matrix)
        self.importance = saved.importance
        self.metrics = content["metrics"]
        self.history = content.get("history", [])
        self.costs = self._read_costs()[: self.done]
        self.steps = content.get("steps", [])

    def begin(self, model: nn.Module) -> None:
        """Write that nothing is learnt yet."""
        write_results(self.folder.results, self._runs(), self._details(model))

    def write(self, model: nn.Module) -> None:
        """Write results.json, and the report after the last task or one that took its time.

        Pictures take longer than a small task; if they fail, it is a warning.
        """
        costs = json.dumps([asdict(cost) for cost in self.costs], indent=2)
        write_atomically(self._costs_file, costs + "\n")
        if self.done < len(self.plan.tasks) and self.costs[-1].seconds < WORTH_A_REPORT:
            write_results(self.folder.results, self._runs(), self._details(model))
            return
        notes, details = self._notes(model), self._details(model)
        write_report(self.folder.path, self._runs(), notes=notes, details=details)

    def complete(self, model: nn.Module) -> None:
        """Make the report of results that are there, if a kill came between the two."""
        results, report = self.folder.results, self.folder.path / "report.md"
        if not report.exists() or report.stat().st_mtime_ns < results.stat().st_mtime_ns:
            write_pages(self.folder.path, self._runs(), notes=self._notes(model))

    def _runs(self) -> dict[str, dict[int, Outcome]]:
        outcome = Outcome(self.matrix, importance=self.importance)
        return {self.plan.method: {self.plan.args.seed: outcome}}

    @property
    def _costs_file(self) -> Path:
        return self.folder.path / "costs.json"

    def _read_costs(self) -> list[Cost]:
        try:
            return [Cost(**cost) for cost in json.loads(self._costs_file.read_text())]
        except (OSError, ValueError, TypeError):
            return []  # no result depends on them

    def _notes(self, model: nn.Module) -> list[str]:
        plan = self.plan
        notes = [
            f"{self.done} of {len(plan.tasks)} tasks learnt; {plan.scenario}-incremental; "
            f"{class_name(model)}, learning rate {plan.args.learning_rate:g}, "
            f"seed {plan.args.seed}."
        ]
        if plan.config is not None:
            notes.append(plan.config.summary())
        if plan.sequence.changes():
            notes.append(f"Sequence: {plan.sequence.summary()}.")
        if plan.scenario == "class":
            notes.append(f"**{CLASS_INCREMENTAL}**")
        return notes

    def _details(self, model: nn.Module) -> Mapping[str, Any]:
        return {
            "scenario": self.plan.scenario,
            "settings": settings_of(self.plan, model),
            "metrics": self.metrics,
            "history": self.history,
            "steps": self.steps,
        }
