"""The methods that a script compares, as its YAML file names them, and the training by each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from transformers import TrainingArguments, set_seed

from hf_ewc.cli.arguments import check_known, one_line_errors
from hf_ewc.config import EWCConfig
from hf_ewc.report import difference_table, score_table, summary_table
from hf_ewc.tasks.methods import Comparison, compare_methods
from hf_ewc.tasks.runner import run_tasks
from hf_ewc.tasks.sequence_config import SequenceConfig
from hf_ewc.tasks.task import Task

_SEEDS = 1 << 32  # of NumPy


@dataclass
class MethodArguments:
    methods: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Names of methods, and for each the settings that differ (in the YAML)."},
    )
    num_seeds: int | None = field(
        default=None,
        metadata={"help": "Repetitions of each method, from --seed on. By default 3."},
    )
    resume: bool = field(
        default=True,
        metadata={"help": "Go on where an earlier run in the output folder ended."},
    )

    def seeds(self, first: int) -> range:
        """Of the repetitions; without methods there is one.

        Raises:
            ValueError: there are none, or several and nothing to repeat them for.
        """
        number = self.num_seeds if self.num_seeds is not None else 3 if self.methods else 1
        if number < 1:
            raise ValueError(f"num_seeds is {number}; needed is at least 1.")
        if number > 1 and not self.methods:
            raise ValueError(
                f"num_seeds is {number}, and without `methods:` there is one run. Name what is to "
                "be repeated, as in `methods: {EWC: {ewc_lambda: 1000}}`."
            )
        seeds = range(first, first + number)
        if not 0 <= first <= seeds[-1] < _SEEDS:
            raise ValueError(f"seed is {first}; needed is a whole number from 0 to {_SEEDS - 1}.")
        return seeds


def checked_methods(
    methods: Any, ewc: EWCConfig, further: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """The methods' settings; those with settings of EWC begin with the file's own of these.

    Args:
        methods: for each name what differs.
        ewc: the file's settings of EWC.
        further: settings of EWC that a script knows besides.

    Raises:
        ValueError: it is no dict, a method has a setting that there is not, or no method takes one
            of the file's own settings of EWC.
    """
    if methods is None:
        return {}
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"methods is {methods!r:.80}; needed is a settings dict for each name.")
    of_ewc = {*further, *(each.name for each in fields(EWCConfig))}
    kinds = (SequenceConfig, TrainingArguments)
    known = [*of_ewc, *(each.name for kind in kinds for each in fields(kind))]
    found = {}
    for name, settings in methods.items():
        if not isinstance(settings or {}, Mapping):
            raise ValueError(f"method {name!r} is {settings!r:.60}; needed are its settings.")
        own = dict(settings or {})
        check_known(own, known, f"method {name!r}")
        found[str(name)] = {**({"ewc_config": ewc} if of_ewc & own.keys() else {}), **own}
    _check_taken(ewc, found)
    return found


def _check_taken(ewc: EWCConfig, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a setting of EWC outside of `methods:` that changes none of them."""
    untouched = EWCConfig()
    for name in (each.name for each in fields(EWCConfig)):
        value = getattr(ewc, name)
        users = [method for method, own in methods.items() if "ewc_config" in own]
        if value == getattr(untouched, name) or any(name not in methods[each] for each in users):
            continue
        why = f"{' and '.join(map(repr, users))} set their own" if users else "none has EWC"
        raise ValueError(
            f"{name} is {value!r:.60}, which changes none of the methods: {why}. Set it in the "
            "lines of the methods under `methods:`."
        )


def learn(
    make_model: Callable[[], Any],
    tasks: Sequence[Task],
    args: TrainingArguments,
    ewc: EWCConfig,
    given: MethodArguments,
    **options: Any,
) -> None:
    """Train by each method with each seed, or once with EWC where there are none; print tables.

    Args:
        make_model: called for each run after the seed is set.
        tasks: in the order of training.
        args: for every run.
        ewc: the file's settings of EWC.
        given: with `methods` as `checked_methods` returns them.
        options: further arguments of `run_tasks`.
    """
    options["resume"] = given.resume
    with one_line_errors(only_own=True):
        if given.methods:
            seeds, methods = given.seeds(args.seed), cast(Any, given.methods)
            comparison = compare_methods(make_model, tasks, args, methods, seeds, **options)
            tables = [*_of_others(comparison), str(comparison), difference_table(comparison.runs)]
        else:
            set_seed(args.seed)
            result = run_tasks(make_model(), tasks, args, ewc, **options)
            tables = [score_table([result.matrix]), summary_table({"EWC": [result.matrix]})]
    if args.should_save:
        print("\n" + "\n\n".join(filter(None, tables)))
        print(f"\nWritten to {args.output_dir}: report.md with its pictures, results.json")


def _of_others(comparison: Comparison) -> list[str]:
    """The scores by each method, where something is scored that no measure counts."""
    repeats = {name: [o.matrix for o in runs.values()] for name, runs in comparison.runs.items()}
    return [f"{name}\n\n{score_table(found)}" for name, found in repeats.items() if found[0].others]
