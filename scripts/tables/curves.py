"""How the accuracy depends on λ, and on the number of examples that the Fisher is estimated on.

    scripts/reproduce curves [--lambda_runs FOLDER] [--seeds N]

λ: what `scripts/reproduce choosing_lambda` has left in its folder, a panel for each sequence.
Examples: Split MNIST as there, 300 steps a task, with λ = 1e3.
The picture is curves.png in the folder of the runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from choosing_lambda import Runs, accuracies
from matplotlib.figure import Figure
from options import TableOptions, parsed
from sequences import SEQUENCES, split_mnist

from hf_ewc.report import Outcome, read_outcomes
from hf_ewc.report.canvas import draw, line, marker, palette, panels
from hf_ewc.report.statistics import estimate

COUNTS = (10, 50, 200, 1000)
LAMBDAS = (1e3,)
Points = Mapping[float, list[float]]  # the ACC of each seed, by λ or by the number of examples


@dataclass
class CurveOptions(TableOptions):
    lambda_runs: str = field(
        default="runs/tables/choosing_lambda",
        metadata={"help": "Where the runs of `choosing_lambda` are."},
    )


@dataclass(frozen=True)
class Panel:
    """Lines over one axis, and levels that do not depend on it."""

    title: str
    axis: str
    lines: Mapping[str, Points]
    levels: Mapping[str, list[float]]


def runs_in(folder: Path) -> Runs:
    """What is done so far in the folder of a comparison, by method and seed."""
    found: dict[str, dict[int, Outcome]] = {}
    for file in sorted(folder.glob("*/seed-*/results.json")):
        (repeats,) = read_outcomes(file)[0].values()
        (outcome,) = repeats.values()
        if outcome.matrix.num_learnt == len(outcome.matrix.tasks):
            found.setdefault(file.parts[-3], {})[int(file.parent.name[len("seed-") :])] = outcome
    return found


def over_lambda(title: str, runs: Runs) -> Panel:
    found = accuracies(runs)
    fixed = {float(name): scores for name, scores in found.items() if name[0].isdigit()}
    return Panel(title, "λ", {"λ": dict(sorted(fixed.items()))}, {"plain": found["plain"]})


def over_examples(options: CurveOptions) -> Panel:
    methods = {
        f"λ = {λ:g}, {count} examples": {"ewc_lambda": λ, "fisher_samples": count}
        for λ in LAMBDAS
        for count in COUNTS
    }
    found = accuracies(
        split_mnist(options).compared(methods, Path(str(options.output_dir)), options).runs
    )
    lines = {
        f"λ = {λ:g}": {count: found[f"λ = {λ:g}, {count} examples"] for count in COUNTS}
        for λ in LAMBDAS
    }
    return Panel("split_mnist", "examples of the Fisher", lines, {})


def figure_of(every: list[Panel]) -> Figure:
    """Means with their standard errors; levels are dashed."""
    figure, axes = panels(len(every), 3.2, 2.6)
    for axis, panel in zip(axes, every, strict=True):
        colours = palette(len(panel.lines) + len(panel.levels))
        for k, (name, points) in enumerate(panel.lines.items()):
            scores = [estimate(values) for values in points.values()]
            axis.errorbar(
                list(points), [one.mean for one in scores], [one.error for one in scores],
                label=name, color=colours[k], marker=marker(k), capsize=3,
            )  # fmt: skip
        for k, (name, values) in enumerate(panel.levels.items(), len(panel.lines)):
            axis.axhline(np.mean(values), label=name, color=colours[k], linestyle=line(k))
        axis.set(title=panel.title, xlabel=panel.axis, ylabel="average accuracy", xscale="log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def main() -> None:
    options: CurveOptions = parsed("curves", kind=CurveOptions)
    done = {name: runs_in(Path(options.lambda_runs) / name) for name in SEQUENCES}
    every = [over_lambda(name, runs) for name, runs in done.items() if runs]
    every.append(over_examples(options))
    for panel in every:
        for name, points in panel.lines.items():
            shown = ", ".join(f"{x:g}: {np.mean(values):.3f}" for x, values in points.items())
            print(f"{panel.title}, {name}, {panel.axis} {shown}", flush=True)
    picture = Path(str(options.output_dir)) / "curves.png"
    picture.write_bytes(draw(lambda: figure_of(every)))
    print(f"Written to {picture}")


if __name__ == "__main__":
    main()
