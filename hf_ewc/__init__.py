"""Elastic Weight Consolidation for Hugging Face Transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `hf_ewc.metrics` and `hf_ewc.report` do not pull in torch.
_MODULES = {
    "AccuracyMatrix": "metrics",
    "EWCConfig": "config",
    "EWCMixin": "training.trainer",
    "EWCSeq2SeqTrainer": "training.trainer",
    "EWCState": "state.ewc_state",
    "EWCTrainer": "training.trainer",
    "Fisher": "importance",
    "SequenceConfig": "tasks.sequence_config",
    "Task": "tasks.task",
    "compare_methods": "tasks.methods",
    "estimate_fisher": "fisher",
    "find_lambda": "training.find_lambda",
    "run_tasks": "tasks.runner",
}

__all__ = [
    "AccuracyMatrix",
    "EWCConfig",
    "EWCMixin",
    "EWCSeq2SeqTrainer",
    "EWCState",
    "EWCTrainer",
    "Fisher",
    "SequenceConfig",
    "Task",
    "compare_methods",
    "estimate_fisher",
    "find_lambda",
    "run_tasks",
]

if TYPE_CHECKING:
    from hf_ewc.config import EWCConfig
    from hf_ewc.fisher import estimate_fisher
    from hf_ewc.importance import Fisher
    from hf_ewc.metrics import AccuracyMatrix
    from hf_ewc.state.ewc_state import EWCState
    from hf_ewc.tasks.methods import compare_methods
    from hf_ewc.tasks.runner import run_tasks
    from hf_ewc.tasks.sequence_config import SequenceConfig
    from hf_ewc.tasks.task import Task
    from hf_ewc.training.find_lambda import find_lambda
    from hf_ewc.training.trainer import EWCMixin, EWCSeq2SeqTrainer, EWCTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
