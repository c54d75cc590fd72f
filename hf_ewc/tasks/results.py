"""What a run over tasks comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report import Cost
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.history import Entry
from hf_ewc.tasks.task import Figures
from hf_ewc.training.lambda_curve import LambdaCurve


@dataclass
class TaskResults:
    """What `run_tasks` returns.

    Attributes:
        matrix: R[i, j], the score on task j after training task i.
        metrics: everything evaluation gave, `metrics[i][name]` after training task i.
        output_dir: where results.json, report.md, the plots and each task's model are.
        model: the model after the last task.
        state: the EWC state after the last task, None without EWC.
        figures: what `after_task` returned after task i, `figures[i]`.
        cost: seconds, and peak memory in bytes, of training, Fisher and evaluation, over all calls.
        history: what was logged while training task i, `history[i]`: steps, losses, learning rates.
        searches: how λ was found before each task, with `ewc_lambda="auto"`.
    """

    matrix: AccuracyMatrix
    metrics: list[dict[str, Figures]]
    output_dir: Path
    model: nn.Module
    state: EWCState | None = None
    history: list[list[Entry]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    figures: list[dict[str, Any]] = field(default_factory=list)
    searches: list[LambdaCurve] = field(default_factory=list)
