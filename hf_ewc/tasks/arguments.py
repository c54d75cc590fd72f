"""The training arguments of one task."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from hf_ewc.tasks.task import Task

# What belongs to the run as a whole.
_OF_THE_RUN = ("output_dir", "seed", "data_seed", "use_cpu", "fsdp", "fsdp_config", "deepspeed")


def own_arguments(task: Task, args: TrainingArguments) -> dict[str, Any]:
    """The task's own settings, checked and in the types that the arguments hold.

    Raises:
        ValueError: a name that is no training argument, or one that is the whole run's.
        TypeError: they are no mapping.
    """
    given = task.training_args
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"training_args of task {task.name!r} is a {type(given).__name__}; give a dict of the "
            "settings that differ, such as {'num_train_epochs': 5}."
        )
    known = {each.name for each in dataclasses.fields(args) if each.init}
    for name in given:
        if name not in known:
            raise ValueError(f"task {task.name!r} sets {name!r}, which is no training argument.")
        if name in _OF_THE_RUN:
            raise ValueError(f"task {task.name!r} sets {name!r}, which is one for the whole run.")
    try:
        checked = type(args)(
            **{"output_dir": args.output_dir, "report_to": "none", "use_cpu": args.use_cpu}
            | dict(given)
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"training_args of task {task.name!r}: {error}") from error
    return {name: getattr(checked, name) for name in given}


def arguments_of(task: Task, args: TrainingArguments, index: int, folder: str) -> TrainingArguments:
    """The run's arguments with the task's own settings, folder and seed."""
    found = copy.copy(args)
    for name, value in own_arguments(task, args).items():
        setattr(found, name, value)
    found.output_dir = folder
    found.seed = args.seed + index
    return found
