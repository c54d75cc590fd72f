"""How λ does over five sequences of tasks: fixed, what each value loses where, and found by itself.

    scripts/reproduce choosing_lambda [--only digits split_mnist ...] [--seeds N]

Each sequence is learnt plainly, with each λ of a grid of two values a decade, and in three ways by
which λ changes from task to task: "state", the untouched `EWCConfig`, takes it from the state's
importance, "auto" finds it on training data alone, and "falling" is λ = 3000 · 0.7^(k − 1) after k
tasks. The grid is judged by the same test data as the rest: its best is a bound that nobody can
choose, against which the others are held. What the trials of "auto" take beside its trainings, in
steps and in seconds, is printed too.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from options import parsed
from sequences import SEQUENCES, TaskSequence

from hf_ewc import EWCConfig
from hf_ewc.report import Outcome
from hf_ewc.report.statistics import estimate
from hf_ewc.report.tables import table
from hf_ewc.tasks.methods import Settings

AUTO = "auto"
FALLING = {"ewc_lambda": 3e3, "ewc_lambda_growth": 0.7}
DEFAULT = str(EWCConfig().ewc_lambda)
Runs = Mapping[str, Mapping[int, Outcome]]


def methods_of(sequence: TaskSequence) -> dict[str, Settings]:
    strengths = sorted({*sequence.lambdas, 1e3})
    fixed = {written(λ): {"ewc_lambda": λ} for λ in strengths}
    ways = {DEFAULT: {"ewc_lambda": DEFAULT}, AUTO: {"ewc_lambda": AUTO}, "falling": FALLING}
    return {"plain": {}, **fixed, **ways}


def written(strength: float) -> str:
    return f"{strength:.0e}".replace("e+0", "e").replace("e-0", "e-")


def accuracies(runs: Runs) -> dict[str, list[float]]:
    """ACC by method, one for each seed."""
    return {
        method: [outcome.matrix.average_accuracy() for outcome in repeats.values()]
        for method, repeats in runs.items()
    }


def best_of_grid(found: Mapping[str, list[float]]) -> str:
    """The λ with the highest mean ACC."""
    return max((m for m in found if m[0].isdigit()), key=lambda m: float(np.mean(found[m])))


def row(name: str, found: Mapping[str, list[float]], methods: list[str]) -> list[str]:
    """Mean ± standard error of ACC by method, the best λ of the grid in bold."""
    best = best_of_grid(found)
    cells = []
    for method in methods:
        if method not in found:
            cells.append("")
            continue
        mean, error = (one := estimate(found[method])).mean, one.error
        shown = f"{mean:.3f} ± {error:.3f}"
        cells.append(f"**{shown}**" if method == best else shown)
    return [f"{name} ({len(found[best])} seeds)", *cells]


def lost_to_best(name: str, found: Mapping[str, list[float]], methods: list[str]) -> list[str]:
    """What the mean ACC of each method lacks to the best λ of the grid."""
    best = best_of_grid(found)
    top = float(np.mean(found[best]))
    cells = [f"{top - np.mean(found[m]):.3f}" if m in found else "" for m in methods]
    return [f"{name}: {best}", *cells]


def cost_of_auto(runs: Runs, folder: Path) -> str:
    """What its trials take, in units of its trainings: steps of all runs, seconds of the median."""
    steps, own, seconds = 0, 0, []
    for seed, outcome in runs[AUTO].items():
        trials = [trial for search in outcome.searches for trial in search["trials"]]
        steps += sum(trial["steps"] for trial in trials)
        run = json.loads((folder / AUTO / f"seed-{seed}" / "results.json").read_text())
        own += sum(run["steps"])
        searching = sum(trial["seconds"] for trial in trials)
        seconds.append(searching / ((outcome.seconds or math.nan) - searching))
    return f"{steps / own:.2f} of the steps, {np.median(seconds):.2f} of the seconds"


def in_order(results: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """All methods: plain, the fixed λ from small to large, the others."""
    names = {method for found in results.values() for method in found}
    fixed = sorted((name for name in names if name[0].isdigit()), key=float)
    return ["plain", *fixed, *sorted(names - {"plain", *fixed})]


def shown(results: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Both tables, of all sequences."""
    methods = in_order(results)
    levels = [row(name, found, methods) for name, found in results.items()]
    losses = [lost_to_best(name, found, methods) for name, found in results.items()]
    return "\n\n".join([
        "Average accuracy by λ, mean ± standard error:",
        table(["", *methods], levels),
        "What is lost to the best λ of the grid:",
        table(["best λ", *methods], losses),
    ])  # fmt: skip


def main() -> None:
    options = parsed("choosing_lambda")
    results = {}
    for name in options.among(SEQUENCES):
        sequence = SEQUENCES[name](options)
        folder = Path(str(options.output_dir)) / name
        runs = sequence.compared(methods_of(sequence), folder, options).runs
        results[name] = accuracies(runs)
        print(shown({name: results[name]}), flush=True)
        print(f"\nThe trials of {AUTO}: {cost_of_auto(runs, folder)}\n", flush=True)
    print(shown(results))


if __name__ == "__main__":
    main()
