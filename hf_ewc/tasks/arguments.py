"""The training arguments of one task."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from hf_ewc.tasks.task import Task

# What belongs to the run as a whole.
_OF_THE_RUN = (
    *("output_dir", "seed", "data_seed", "use_cpu", "fsdp", "fsdp_config", "deepspeed"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
)


def checked(given: Any, args: TrainingArguments, owner: str) -> dict[str, Any]:
    """Settings that differ from the run's, in the types that training arguments hold.

    Args:
        owner: whose they are, for the messages.

    Raises:
        ValueError: a name that is no training argument, or one that is the whole run's.
        TypeError: they are no mapping.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{owner} has training arguments in a {type(given).__name__}; give a dict of the "
            "settings that differ, such as {'num_train_epochs': 5}."
        )
    known = {each.name for each in dataclasses.fields(args) if each.init}
    for name in given:
        if name not in known:
            raise ValueError(f"{owner} sets {name!r}, which is no training argument.")
        if name in _OF_THE_RUN:
            raise ValueError(f"{owner} sets {name!r}, which is one for the whole run.")
    if not given:
        return {}
    fixed = {"output_dir": args.output_dir, "report_to": "none", "use_cpu": args.use_cpu}
    try:
        normal = type(args)(**(fixed | dict(given)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner} has training arguments that are not allowed: {error}") from error
    return {name: getattr(normal, name) for name in given}


def with_settings(args: TrainingArguments, settings: Mapping[str, Any]) -> TrainingArguments:
    """A copy of the arguments with these settings."""
    found = copy.copy(args)
    for name, value in settings.items():
        setattr(found, name, value)
    return found


def own_arguments(task: Task, args: TrainingArguments) -> dict[str, Any]:
    """The task's own settings, checked as in `checked`."""
    return checked(task.training_args or {}, args, f"task {task.name!r}")


def arguments_of(task: Task, args: TrainingArguments, index: int, folder: str) -> TrainingArguments:
    """The run's arguments with the task's own settings, folder and seed.

    They report to nothing: trackers see one run for all tasks, by the `SequenceTracker`. They push
    nothing: the last model goes to the Hub in the end, by its `Repository`.
    """
    own = own_arguments(task, args)
    run = {"output_dir": folder, "seed": args.seed + index, "report_to": [], "push_to_hub": False}
    return with_settings(args, {**own, **run})
