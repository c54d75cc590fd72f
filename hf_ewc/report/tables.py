"""Scores and measures as Markdown tables, whose columns also line up in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report.names import in_markdown
from hf_ewc.report.outcome import Given, Runs, as_runs, figure_of, matrices
from hf_ewc.report.statistics import (
    LABELS,
    Estimate,
    differences,
    mean_scores,
    reference_of,
    shown_summary,
    summarize,
)

MOST_COLUMNS = 30  # tasks beyond which a matrix is given by its diagonal and its last row
_WIDEST = 120  # characters of column names beyond which columns have numbers


def score_table(repeats: Sequence[AccuracyMatrix]) -> str:
    """R: a row for each task trained, a column for each task tested; mean ± standard error.

    What is only evaluated stands behind the tasks, and what it was before them in the first row.
    Columns have the tasks' numbers where their names would take too much room. Beyond 30 tasks a
    row for each task tells its score when it was learnt and in the end.
    """
    if len(repeats[0].tasks) > MOST_COLUMNS:
        return _table_of_many(repeats)
    first = repeats[0]
    names = [*first.tasks, *first.others]
    mean, error = _with_others(repeats)
    shown = [in_markdown(name) for name in names]
    is_wide = sum(map(len, shown)) > _WIDEST
    header = [str(j) for j in range(1, len(names) + 1)] if is_wide else shown
    rows = [
        [_trained(shown, i, is_wide), *_cells(mean[i], error[i], len(repeats))]
        for i in range(len(mean))
        if not np.isnan(mean[i]).all()
    ]
    arrows = [f"{name} ↓" if n in first.lower_is_better else name
              for name, n in zip(header, names, strict=True)]  # fmt: skip
    shown_table = table(["score on", *arrows], rows)
    others = len(first.tasks)
    if is_wide and first.others:
        kept = "; ".join(f"{j + 1}: {shown[j]}" for j in range(others, len(names)))
        shown_table += f"\n\nOnly evaluated: {kept}."
    return shown_table


def search_table(runs: Given) -> str:
    """How λ was found: a row for each trial; empty where it was not looked for."""
    rows = [
        [
            in_markdown(method), str(seed), _searched(search), f"{trial['ewc_lambda']:g}",
            "stopped half-way" if trial["stopped"] else _shown(figure_of(trial, search)),
            "" if trial["kept"] is None else f"{100 * trial['kept']:.0f} %",
            str(trial["steps"]), f"{trial['seconds']:.1f}",
            _use(trial, search),
        ]
        for method, repeats in as_runs(runs).items()
        for seed, outcome in repeats.items()
        for search in outcome.searches
        for trial in search["trials"]
    ]  # fmt: skip
    header = ["method", "seed", "before task", "λ", "score", "kept", "steps", "seconds", ""]
    return table(header, rows) if rows else ""


def _searched(search: Mapping[str, Any]) -> str:
    arrow = " ↓" if search.get("by_improvement") else ""
    return in_markdown(search["task"]) + arrow


def _use(trial: Mapping[str, Any], search: Mapping[str, Any]) -> str:
    """Whether this λ was used, or behind the last trial the one between two that was."""
    tried = [one["ewc_lambda"] for one in search["trials"]]
    if search["chosen"] is None or search["chosen"] in tried:
        return "used" if trial["ewc_lambda"] == search["chosen"] else ""
    return f"{search['chosen']:g} used" if trial["ewc_lambda"] == tried[-1] else ""


def _shown(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def _trained(shown: Sequence[str], row: int, is_wide: bool) -> str:
    if row == 0:
        return "before"
    return f"after {row}. {shown[row - 1]}" if is_wide else f"after {shown[row - 1]}"


def _with_others(repeats: Sequence[AccuracyMatrix]) -> tuple[np.ndarray, np.ndarray]:
    """Figures, (T + 1, T + others) with a first row before the first task, and their errors."""
    first = repeats[0]
    mean, error = mean_scores(repeats)
    above = np.full((1, len(first)), np.nan)
    mean, error = np.vstack([above, mean * first.signs]), np.vstack([above, error])
    for name in first.others:
        column, spread = _estimates([m.others[name] * first.sign(name) for m in repeats])
        mean, error = np.column_stack([mean, column]), np.column_stack([error, spread])
    return mean, error


def _estimates(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis."""
    stack = np.stack(values)
    count = len(stack)
    error = stack.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else 0 * stack[0]
    return stack.mean(axis=0), error


def _table_of_many(repeats: Sequence[AccuracyMatrix]) -> str:
    first = repeats[0]
    mean, error = mean_scores(repeats)
    mean = mean * first.signs
    last = max((m.num_learnt for m in repeats), default=0) - 1
    rows = []
    for j, task in enumerate(first.tasks[: last + 1]):
        cells = _cells(mean[[j, last], j], error[[j, last], j], len(repeats))
        arrow = " ↓" if task in first.lower_is_better else ""
        rows.append([f"{j + 1}. {in_markdown(task)}{arrow}", *cells])
    return table(["score on", "when learnt", "in the end"], rows)


def summary_table(runs: Given) -> str:
    """The measures: a row for each method; mean ± standard error over the seeds."""
    checked = as_runs(runs)
    summaries = {name: summarize(matrices(repeats)) for name, repeats in checked.items()}
    first = next(iter(checked.values()))
    matrix = matrices(first)[0]
    found = {method: shown_summary(matrix, summary) for method, summary in summaries.items()}
    return _by_measure(found, labels(matrix))


def difference_table(runs: Given, reference: str | None = None) -> str:
    """The measures minus the reference's, paired by seed; empty with nothing to compare."""
    checked = as_runs(runs)
    reference = reference or reference_of(checked)
    if reference not in checked or len(checked) < 2:
        return ""
    found = {
        method: shown_summary(matrices(repeats)[0], differences(repeats, checked[reference]))
        for method, repeats in checked.items()
        if method != reference
    }
    matrix = matrices(checked[reference])[0]
    return _by_measure(found, labels(matrix), f"minus {in_markdown(reference)}", sign="+")


def cost_table(runs: Runs) -> str:
    """Seconds and peak memory of a run, the mean over seeds; empty where neither is known."""
    rows = []
    for method, repeats in runs.items():
        seconds = [o.seconds for o in repeats.values() if o.seconds is not None]
        memory = [o.peak_memory for o in repeats.values() if o.peak_memory is not None]
        if seconds or memory:
            rows.append([
                in_markdown(method),
                f"{np.mean(seconds):.1f}" if seconds else "",
                f"{max(memory) / 2**20:.0f}" if memory else "",
                ", ".join(map(str, repeats)),
            ])  # fmt: skip
    return table(["", "seconds a run", "peak memory (MiB)", "seeds"], rows) if rows else ""


def labels(matrix: AccuracyMatrix) -> dict[str, str]:
    """The measures' names; where lower is better for all tasks, by the name of their figure."""
    figures = {matrix.lower_is_better.get(task) for task in matrix.tasks}
    figure = next(iter(figures)) if len(figures) == 1 else None
    if figure is None:
        return LABELS
    shown = in_markdown(figure)
    return {
        **LABELS,
        "average_accuracy": f"average {shown} ↓",
        "learning_accuracy": f"{shown} when learnt ↓",
    }


def _by_measure(
    found: Mapping[str, Mapping[str, Estimate]],
    names: Mapping[str, str],
    corner: str = "",
    sign: str = "",
) -> str:
    """A row for each method, a column for each measure that some method has."""
    columns = [name for name in names if any(name in summary for summary in found.values())]
    rows = [
        [in_markdown(method), *(_estimate(summary.get(name), sign) for name in columns)]
        for method, summary in found.items()
    ]
    return table([corner, *(names[name] for name in columns)], rows)


def _estimate(found: Estimate | None, sign: str = "") -> str:
    return "" if found is None else number(found.mean, found.error, found.seeds, sign)


def _cells(mean: Iterable[float], error: Iterable[float], repeats: int) -> list[str]:
    return [number(m, e, repeats) for m, e in zip(mean, error, strict=True)]


def number(mean: float, error: float = 0.0, repeats: int = 1, sign: str = "") -> str:
    """Three digits behind the point, also where a figure is too large to be written out."""
    if np.isnan(mean):
        return ""
    kind = f"{sign}.3f" if abs(mean) < 1e5 else f"{sign}.3e"
    return f"{mean:{kind}} ± {error:{kind.lstrip('+')}}" if repeats > 1 else f"{mean:{kind}}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[k]) for row in [header, *rows])) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])
