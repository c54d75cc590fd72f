"""The training arguments of one task."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from hf_ewc.tasks.task import Task

_AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
)
_LENGTHS = ("num_train_epochs", "max_steps")
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
    _check_numbers(given, type(args), owner)
    _check_length(given, args, owner)
    fixed = {"output_dir": args.output_dir, "report_to": "none", "use_cpu": args.use_cpu}
    try:
        normal = type(args)(**(fixed | dict(given)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner} has training arguments that are not allowed: {error}") from error
    _check_optimizer(normal, given, owner)
    return {name: getattr(normal, name) for name in given}


def _check_numbers(given: Mapping[str, Any], kind: type[TrainingArguments], owner: str) -> None:
    """Refuse what is no number where one is needed, or no example or step: a `ValueError`."""
    types = get_type_hints(kind)
    for name, value in given.items():
        kinds = set(get_args(types[name]) or (types[name],))
        if not kinds <= {int, float, type(None)} or (value is None and type(None) in kinds):
            continue
        number, wanted = (Real, "a number") if float in kinds else (Integral, "an integer")
        if isinstance(value, bool) or not isinstance(value, number):
            raise ValueError(f"{owner} sets {name} to {value!r}; needed is {wanted}.")
        if name in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"{owner} sets {name} to {value!r}; needed is at least 1.")
        if name == "learning_rate" and not 0 <= float(value) < math.inf:
            raise ValueError(f"{owner} sets {name} to {value!r}; needed is a number from 0 on.")


def _check_length(given: Mapping[str, Any], args: TrainingArguments, owner: str) -> None:
    if given.get("num_train_epochs", 1) <= 0 and given.get("max_steps", args.max_steps) <= 0:
        raise ValueError(
            f"{owner} sets num_train_epochs to {given['num_train_epochs']!r}, by which it would be "
            "trained for no step; needed is more than 0."
        )


def check_run(args: TrainingArguments, tasks: Sequence[Task], trainer_class: type[Any]) -> None:
    """Refuse settings of a run with which a task could not be trained: a `ValueError`."""
    of_run = {name: getattr(args, name) for name in (*_AT_LEAST_ONE, "learning_rate")}
    _check_numbers(of_run, TrainingArguments, "the run")
    check_seed(args.seed, tasks)
    schedules = getattr(trainer_class, "create_scheduler", None)
    if args.lr_scheduler_kwargs and schedules is Trainer.create_scheduler:
        _check_optimizer(args, {"lr_scheduler_kwargs": args.lr_scheduler_kwargs}, "the run")
    for task in tasks:
        own = own_arguments(task, args)
        lengths = {name: own.get(name, getattr(args, name)) for name in _LENGTHS}
        if all(length <= 0 for length in lengths.values()):
            found = " and ".join(f"{name} {length:g}" for name, length in lengths.items())
            raise ValueError(
                f"task {task.name!r} has {found}, by which it would be trained for no step; needed "
                "is more than 0 of one."
            )


def check_seed(seed: int, tasks: Sequence[Task]) -> None:
    """Refuse a seed of a run that is none for one of its tasks, each of which has the next one."""
    last = 2**32 - len(tasks)
    if not 0 <= seed <= last:
        raise ValueError(
            f"seed is {seed!r}; allowed is 0 to {last}, since each task has the next one, and "
            "2**32 - 1 is the largest there is."
        )


def _check_optimizer(args: TrainingArguments, given: Mapping[str, Any], owner: str) -> None:
    """Refuse an optimizer that is not installed, or a schedule that lacks its settings."""
    try:
        if "optim" in given:
            model: Any = nn.Linear(1, 1)
            Trainer.get_optimizer_cls_and_kwargs(args, model)
        if given.keys() & {"lr_scheduler_type", "lr_scheduler_kwargs"}:
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
            settings: Any = args.lr_scheduler_kwargs
            get_scheduler(args.lr_scheduler_type, optimizer, 1, 9, settings)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"{owner} has an optimizer or a schedule that there is not: {error}"
        ) from error


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
    nothing: the last model goes to the Hub in the end, by its `Repository`. A task that goes on
    from a checkpoint has its callbacks as they were there, such as the patience of early stopping.
    """
    own = own_arguments(task, args)
    run = {"output_dir": folder, "seed": args.seed + index, "report_to": [], "push_to_hub": False}
    return with_settings(args, {**own, **run, "restore_callback_states_from_checkpoint": True})
