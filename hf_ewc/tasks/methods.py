"""Every way of training over the same tasks, side by side."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_ewc.config import EWCConfig
from hf_ewc.config.checked import integer
from hf_ewc.report import Outcome, summary_table, write_report
from hf_ewc.report.results import read_outcomes
from hf_ewc.state.by_layer import importance_by_layer
from hf_ewc.tasks.arguments import check_seed, checked, with_settings
from hf_ewc.tasks.checks import LONGEST_NAME
from hf_ewc.tasks.folder_lock import only_run_in
from hf_ewc.tasks.main_process import by_main_process, held_by_main_process
from hf_ewc.tasks.results import TaskResults
from hf_ewc.tasks.run_folder import OWN_FILES, refuse_somebodys_report, safe_name
from hf_ewc.tasks.runner import planned, run_tasks
from hf_ewc.tasks.sequence_config import SequenceConfig
from hf_ewc.tasks.task import Task
from hf_ewc.tasks.trainer_arguments import check_trainer_arguments
from hf_ewc.training.trainer import EWCTrainer

logger = logging.getLogger("hf_ewc")

Settings = Mapping[str, Any] | EWCConfig | SequenceConfig | None
_TRAINING = {each.name for each in fields(TrainingArguments) if each.init}
_EWC = {each.name for each in fields(EWCConfig)}
_SEQUENCE = {each.name for each in fields(SequenceConfig)}
_RUN = set(inspect.signature(run_tasks).parameters) - {"model", "tasks", "args", "trainer_kwargs"}


@dataclass(frozen=True)
class Comparison:
    """What `compare_methods` returns.

    Attributes:
        runs: what each method came to, by method and seed.
        output_dir: where results.json, report.md, the pictures and each run are.
    """

    runs: dict[str, dict[int, Outcome]]
    output_dir: Path

    def __str__(self) -> str:
        """The measures of each method as a Markdown table."""
        return summary_table(self.runs)


@dataclass(frozen=True)
class Method:
    """One way of training: what differs from the others."""

    make_model: Callable[[], nn.Module]
    args: TrainingArguments
    options: dict[str, Any]

    @property
    def is_joint(self) -> bool:
        sequence = self.options.get("sequence_config")
        return sequence is not None and sequence.joint_training


def compare_methods(
    make_model: Callable[[], nn.Module],
    tasks: Sequence[Task],
    args: TrainingArguments,
    methods: Mapping[str, Settings],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    title: str = "Ways of not forgetting",
    **options: Any,
) -> Comparison:
    """Train by each method with each seed, through `run_tasks`, and write one report.

    All have the same tasks in the same order, the same training arguments but for what differs, and
    with the same seed the same first weights and order of the data. What is replayed differs from
    seed to seed, too: seed s draws with `replay_seed + s`. Killed at any moment, the same
    call goes on. Where a method trains jointly (`joint_training`), its score on each task right
    after it is the reference for the others' intransigence; where one is named "plain…", the report
    has each other's paired difference to it.

    Args:
        make_model: called for each run after the seed is set.
        tasks: in the order of training.
        args: for every run; `args.output_dir` holds a folder for each method and seed.
        methods: for each name what differs: fields of `EWCConfig` (which switch EWC on), of
            `SequenceConfig` and of `TrainingArguments`, a `make_model` of its own, or any argument
            of `run_tasks`; `{}` trains plainly. An `EWCConfig` or a `SequenceConfig` may stand for
            itself.
        seeds: of the repetitions.
        title: of the report.
        options: further arguments of `run_tasks`, for all methods.

    Raises:
        ValueError, TypeError: no methods or seeds, a setting that there is not, or what `run_tasks`
            refuses, before anything is trained.
    """
    _check(make_model, methods, seeds)
    seeds = [int(seed) for seed in seeds]
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub is for one model, and compare_methods trains one by each method with each "
            "seed; leave it out, or train in one way by run_tasks (a recipe: without methods)."
        )
    resolved = {
        name: _method(name, settings, make_model, args, options)
        for name, settings in methods.items()
    }
    for method in resolved.values():
        planned(tasks, method.args, **_of_plan(method.options))
    for seed in seeds:
        check_seed(seed, tasks)
    folder = Path(str(args.output_dir)).absolute()
    _check_folder(folder, resolved)
    _ = args.device  # sets up the process group, if there is to be one
    runs: dict[str, dict[int, Outcome]] = {name: {} for name in resolved}
    models = _Models()
    with held_by_main_process(only_run_in(folder)):
        for seed in seeds:
            for name, method in resolved.items():
                made = replace(method, make_model=models.by(method.make_model))
                runs[name][seed] = _run(name, made, tasks, seed, folder / safe_name(name))
        runs = _with_reference(runs, resolved)
        by_main_process(
            lambda: write_report(
                folder, runs, title=title, notes=_notes(resolved), details=_details(resolved)
            )
        )
    return Comparison(runs, folder)


class _Models:
    """The models that were trained, to see that each run has one of its own."""

    def __init__(self) -> None:
        self._known: WeakSet[nn.Module] = WeakSet()

    def by(self, make_model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            model = make_model()
            if not isinstance(model, nn.Module):
                raise TypeError(f"make_model returned a {type(model).__name__}; needed is a model.")
            if model in self._known:
                raise ValueError(
                    "make_model returned a model that an earlier run has trained; it has to make a "
                    "new one at each call, such as lambda: AutoModel.from_pretrained(name)."
                )
            self._known.add(model)
            return model

        return made


def _check_folder(folder: Path, methods: Mapping[str, Method]) -> None:
    """Refuse the folder of a single run, or of somebody's report, which would be gone."""
    refuse_somebodys_report(folder)
    results = folder / "results.json"
    runs, details = read_outcomes(results) if results.is_file() else ({}, {})
    gone = [name for name in runs if name not in methods]
    if "settings" in details:
        raise ValueError(
            f"{results} is of a run by run_tasks, which could not go on without it; give "
            "compare_methods another output_dir."
        )
    if gone:
        logger.warning(
            "%s compares %s too, which are not among the methods now and will not be in it; their "
            "own folders stay.",
            results,
            ", ".join(gone),
        )


def _run(name: str, method: Method, tasks: Sequence[Task], seed: int, folder: Path) -> Outcome:
    own = f"{name}, seed {seed}"
    run_name = f"{method.args.run_name} {own}" if method.args.run_name else own
    settings = {"seed": seed, "output_dir": str(folder / f"seed-{seed}"), "run_name": run_name}
    args = with_settings(method.args, settings)
    options = dict(method.options)
    if sequence := options.get("sequence_config"):
        options["sequence_config"] = replace(sequence, replay_seed=sequence.replay_seed + seed)
    set_seed(seed)
    result: TaskResults = run_tasks(method.make_model(), tasks, args, **options)
    return Outcome(
        result.matrix,
        result.cost.seconds,
        result.cost.peak_memory,
        importance_by_layer(result.state) if result.state else None,
        tuple(curve.to_dict() for curve in result.searches),
    )


def _method(
    name: str,
    settings: Settings,
    make_model: Callable[[], nn.Module],
    args: TrainingArguments,
    options: Mapping[str, Any],
) -> Method:
    """What a method's settings come to."""
    own = _as_dict(name, settings)
    training = {key: own.pop(key) for key in _TRAINING & own.keys()}
    ewc = {key: own.pop(key) for key in _EWC & own.keys()}
    sequence = {key: own.pop(key) for key in _SEQUENCE & own.keys()}
    make = own.pop("make_model", make_model)
    found = {**options, **own}
    trainer_class = found.get("trainer_class", EWCTrainer)
    check_trainer_arguments(trainer_class, own.keys() - _RUN, f"method {name!r}", _RUN)
    if ewc:
        found["ewc_config"] = replace(found.get("ewc_config") or EWCConfig(), **ewc)
    if sequence:
        base = found.get("sequence_config") or SequenceConfig()
        found["sequence_config"] = replace(base, **sequence)
    return Method(make, with_settings(args, checked(training, args, f"method {name!r}")), found)


def _as_dict(name: str, settings: Settings) -> dict[str, Any]:
    if settings is None:
        return {}
    if isinstance(settings, EWCConfig):
        return {"ewc_config": settings}
    if isinstance(settings, SequenceConfig):
        return {"sequence_config": settings}
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"method {name!r} is a {type(settings).__name__}; give a dict of the settings that "
            "differ, such as {'ewc_lambda': 1e3}, {'replay_share': 0.05} or {}."
        )
    return dict(settings)


def _check(make_model: Any, methods: Mapping[str, Settings], seeds: Any) -> None:
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(
            f"make_model is a {type(make_model).__name__}; needed is a function without arguments "
            "that makes a new model for each run, such as "
            "lambda: AutoModelForSequenceClassification.from_pretrained(name)."
        )
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError("compare_methods got no methods; give a dict from names to settings.")
    for name in methods:
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
            raise ValueError(
                f"a method's name is {name!r:.60}; needed is a text of at most {LONGEST_NAME} "
                "characters, after which its folder is named."
            )
    if isinstance(seeds, str) or not isinstance(seeds, (Sequence, np.ndarray)):
        raise TypeError(f"seeds is {seeds!r:.60}; give a list of them, such as (0, 1, 2).")
    if len(seeds) == 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give at least one, each once.")
    for seed in seeds:
        if integer("a seed", seed, low=0) >= 2**32:
            raise ValueError(f"a seed is {seed!r}; allowed is an integer below 2**32.")
    folders = [safe_name(name) for name in methods]
    if taken := [name for name in folders if name in OWN_FILES]:
        raise ValueError(
            f"a method's folder would be {taken[0]}, where the comparison's own file is; choose "
            "another name."
        )
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"the methods {list(methods)} would share folders ({folders}); choose other names."
        )


def _of_plan(options: Mapping[str, Any]) -> dict[str, Any]:
    others = ("ewc_state", "joint", "resume")
    return {key: value for key, value in options.items() if key not in others}


def _with_reference(
    runs: dict[str, dict[int, Outcome]], methods: Mapping[str, Method]
) -> dict[str, dict[int, Outcome]]:
    """The runs, each with the scores of the joint run of its seed, where there is one."""
    joint = next((name for name, method in methods.items() if method.is_joint), None)
    if joint is None:
        return runs
    for name, repeats in runs.items():
        for seed, outcome in repeats.items():
            if name != joint and outcome.matrix.joint is None:
                outcome.matrix.joint = runs[joint][seed].matrix.scores.diagonal().copy()
    return runs


def _notes(methods: Mapping[str, Method]) -> list[str]:
    lines = []
    for name, method in methods.items():
        ewc, sequence = (method.options.get(f"{kind}_config") for kind in ("ewc", "sequence"))
        parts = [ewc.summary()] if ewc is not None else []
        parts += [sequence.summary()] if sequence is not None and sequence.changes() else []
        lines.append(f"- **{name}**: {' '.join(parts) or 'plain fine-tuning'}")
    return ["\n".join(lines)]


def _details(methods: Mapping[str, Method]) -> dict[str, Any]:
    return {
        "methods": {
            name: {key: str(value) for key, value in method.options.items()}
            for name, method in methods.items()
        }
    }
