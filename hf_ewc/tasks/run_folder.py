"""Where a run over tasks keeps what it has learnt and measured."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_ewc.tasks.task import Task


class RunFolder:
    """The folder of a run: `results.json`, and a folder for each task with its model in `final`.

    Args:
        path: `output_dir` of the training arguments.
        tasks: in the order of training.
    """

    def __init__(self, path: str | Path, tasks: Sequence[Task]) -> None:
        self.path = Path(path)
        self.results = self.path / "results.json"
        self._names = [_safe(task.name) for task in tasks]

    def task(self, index: int) -> Path:
        """What the trainer of this task writes, its checkpoints among them."""
        return self.path / f"{index + 1:02d}-{self._names[index]}"

    def model(self, index: int) -> Path:
        """The model and the EWC state after this task."""
        return self.task(index) / "final"

    def clear(self) -> None:
        """Remove what an earlier run left for these tasks."""
        for index in range(len(self._names)):
            shutil.rmtree(self.task(index), ignore_errors=True)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"
