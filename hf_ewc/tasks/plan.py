"""What a run over tasks is asked for; nothing in it changes while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.tasks.results import TaskResults
from hf_ewc.tasks.sequence_config import SequenceConfig
from hf_ewc.tasks.task import Metrics, Task

# Of a trainer, its task and the results so far; the figures that it returns are kept.
AfterTask = Callable[[Any, Task, TaskResults], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Plan:
    """The arguments of `run_tasks` that hold for the whole run; see there."""

    tasks: tuple[Task, ...]
    args: TrainingArguments
    config: EWCConfig | None
    trainer_class: type[Any]
    data_collator: Callable[..., Any] | None
    compute_metrics: Metrics | str | Sequence[str] | None
    mask_training: bool
    evaluate_unseen: bool
    evaluate_also: tuple[Task, ...]
    scenario: str
    sequence: SequenceConfig
    log_likelihood: Callable[..., Any] | None
    after_task: AfterTask | None
    trainer_kwargs: dict[str, Any]

    @property
    def method(self) -> str:
        """What the results are filed under."""
        return "plain" if self.config is None else "EWC"
