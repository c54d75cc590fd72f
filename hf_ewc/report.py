"""What is shown and kept of a run: tables, plots, a Markdown report and results.json."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_ewc.files import write_atomically
from hf_ewc.metrics import AccuracyMatrix, Array

# Several methods, each with one matrix per repetition (seed), all over the same tasks.
Runs = Mapping[str, Sequence[AccuracyMatrix]]
LABELS = {
    "average_accuracy": "average accuracy (ACC)",
    "backward_transfer": "backward transfer (BWT)",
    "forward_transfer": "forward transfer (FWT)",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy (LA)",
    "intransigence": "intransigence",
}


def write_report(
    folder: str | os.PathLike[str],
    runs: Runs,
    *,
    title: str = "Continual learning",
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write `results.json`, `report.md`, `accuracy_matrix.png` and `curves.png`, each atomically.

    Args:
        runs: for each method, one matrix per repetition.
        notes: sentences that the report opens with.
        details: whatever else belongs into results.json, such as the configuration (JSON types).

    Returns:
        The path of results.json: `{"runs": {method: [matrix, ...]}, "summary": ..., **details}`.
    """
    folder = Path(folder)
    write_atomically(folder / "accuracy_matrix.png", plot_matrices(runs))
    write_atomically(folder / "curves.png", plot_curves(runs))
    write_atomically(folder / "report.md", markdown(runs, title=title, notes=notes))
    return write_results(folder / "results.json", runs, details)


def write_results(
    path: str | os.PathLike[str], runs: Runs, details: Mapping[str, Any] | None = None
) -> Path:
    """Write results.json alone, atomically; see `write_report`."""
    content = {
        "runs": {method: [m.to_dict() for m in repeats] for method, repeats in runs.items()},
        "summary": {method: _named(summarize(repeats)) for method, repeats in runs.items()},
        **(details or {}),
    }
    return write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_results(
    path: str | os.PathLike[str],
) -> tuple[dict[str, list[AccuracyMatrix]], dict[str, Any]]:
    """The runs of a results.json, and the whole file as it stands.

    Raises:
        ValueError: the file is not JSON, or has no runs.
    """
    try:
        content = json.loads(Path(path).read_text())
        runs = {
            method: [AccuracyMatrix.from_dict(matrix) for matrix in repeats]
            for method, repeats in content["runs"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of hf_ewc ({error!r}).") from error
    return runs, content


def summarize(repeats: Sequence[AccuracyMatrix]) -> dict[str, tuple[float, float]]:
    """Mean and deviation (n - 1; 0 if there is one repetition) of the measures all of them have."""
    summaries = [matrix.summary() for matrix in repeats]
    shared = [name for name in LABELS if all(name in summary for summary in summaries)]
    return {name: _mean_std([summary[name] for summary in summaries]) for name in shared}


def mean_scores(repeats: Sequence[AccuracyMatrix]) -> tuple[Array, Array]:
    """Mean and deviation (n - 1) of R over repetitions, each (T, T), NaN where not measured."""
    stack = np.stack([matrix.scores for matrix in repeats])
    spread = (
        stack.std(axis=0, ddof=1) if len(stack) > 1 else np.where(np.isnan(stack[0]), np.nan, 0.0)
    )
    return stack.mean(axis=0), spread


def score_table(repeats: Sequence[AccuracyMatrix]) -> str:
    """R as a Markdown table: a row for each task trained, a column for each task tested."""
    mean, spread = mean_scores(repeats)
    tasks = repeats[0].tasks
    rows = [
        [
            f"after {tasks[i]}",
            *(_number(mean[i, j], spread[i, j], len(repeats)) for j in range(len(tasks))),
        ]
        for i in range(len(tasks))
        if not np.isnan(mean[i]).all()
    ]
    return _table(["score on", *tasks], rows)


def summary_table(runs: Runs) -> str:
    """The measures as a Markdown table: a row for each method."""
    summaries = {method: summarize(repeats) for method, repeats in runs.items()}
    columns = [name for name in LABELS if any(name in summary for summary in summaries.values())]
    rows = [
        [
            method,
            *(
                _number(*summary[name], len(runs[method])) if name in summary else ""
                for name in columns
            ),
        ]
        for method, summary in summaries.items()
    ]
    return _table(["", *(LABELS[name] for name in columns)], rows)


def markdown(runs: Runs, *, title: str = "Continual learning", notes: Sequence[str] = ()) -> str:
    """The report: notes, measures, score tables, and the plots that lie beside it."""
    repetitions = max((len(repeats) for repeats in runs.values()), default=0)
    parts = [f"# {title}", *notes, summary_table(runs)]
    if repetitions > 1:
        parts.append(f"Mean ± standard deviation over {repetitions} seeds.")
    for method, repeats in runs.items():
        parts += [f"## {method}", score_table(repeats)]
    parts.append("![scores after each task](accuracy_matrix.png)")
    parts.append("![scores as the tasks go by](curves.png)")
    return "\n\n".join(parts) + "\n"


def plot_matrices(runs: Runs) -> bytes:
    """A PNG: R as a heat map, one panel for each method, means over repetitions."""
    tasks = next(iter(runs.values()))[0].tasks
    size = max(3.0, 0.7 * len(tasks) + 1.2)
    figure, panels = _panels(len(runs), width=size, height=size)
    images = []
    means = {method: mean_scores(repeats)[0] for method, repeats in runs.items()}
    low, high = _limits(means.values())
    for panel, (method, mean) in zip(panels, means.items(), strict=True):
        images.append(panel.imshow(mean, vmin=low, vmax=high, cmap="viridis"))
        for i, j in zip(*np.nonzero(~np.isnan(mean)), strict=True):
            dark = mean[i, j] < (low + high) / 2
            text = f"{mean[i, j]:.2f}"
            panel.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
        panel.set_title(method)
        panel.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        panel.set_yticks(range(len(tasks)), tasks)
        panel.set_xlabel("score on task")
        panel.set_ylabel("after training on task")
    figure.colorbar(images[-1], ax=panels, shrink=0.7)
    return _png(figure)


def plot_curves(runs: Runs) -> bytes:
    """A PNG: the score on each task and their average, as training moves from task to task."""
    figure, panels = _panels(len(runs), width=4.5, height=3.5)
    means = {method: mean_scores(repeats)[0] for method, repeats in runs.items()}
    low, high = _limits(means.values())
    margin = 0.03 * (high - low)
    for panel, (method, repeats) in zip(panels, runs.items(), strict=True):
        tasks, mean = repeats[0].tasks, means[method]
        for j, task in enumerate(tasks):
            panel.plot(range(j, len(tasks)), mean[j:, j], marker="o", markersize=3, label=task)
        seen = [np.mean(mean[i, : i + 1]) for i in range(len(tasks))]
        panel.plot(range(len(tasks)), seen, color="black", linewidth=2, label="average")
        panel.set_title(method)
        panel.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        panel.set_xlabel("after training on task")
        panel.set_ylabel("score")
        panel.set_ylim(low - margin, high + margin)
    panels[-1].legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
    return _png(figure)


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * count + 1, height), layout="constrained")
    FigureCanvasAgg(figure)  # its own canvas: pyplot's global state is left alone
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _limits(means: Any) -> tuple[float, float]:
    """From 0 to 1 for accuracies, otherwise as far as the scores go."""
    values = np.concatenate([mean[~np.isnan(mean)] for mean in means])
    if not values.size or (values.min() >= 0 and values.max() <= 1):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _number(mean: float, spread: float, repeats: int) -> str:
    if np.isnan(mean):
        return ""
    return f"{mean:.3f} ± {spread:.3f}" if repeats > 1 else f"{mean:.3f}"


def _named(summary: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "std": std} for name, (mean, std) in summary.items()}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(3, *(len(row[k]) for row in [header, *rows])) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])
