"""Results, report and pictures into a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_ewc.files import write_atomically
from hf_ewc.report.environment import environment, in_words
from hf_ewc.report.names import in_markdown
from hf_ewc.report.outcome import Given, Runs, as_runs, matrices
from hf_ewc.report.results import write_results
from hf_ewc.report.statistics import trade_offs
from hf_ewc.report.tables import (
    cost_table,
    difference_table,
    score_table,
    search_table,
    summary_table,
)

logger = logging.getLogger("hf_ewc")

# What each picture shows, in the order of the report.
PICTURES = {
    "stability_plasticity.png": "forgetting against learning accuracy",
    "accuracy_matrix.png": "scores after each task",
    "curves.png": "scores as the tasks go by",
    "importance.png": "importance by layer",
    "lambda_search.png": "score on examples held out of the new task, by λ",
}


def write_report(
    folder: str | os.PathLike[str],
    runs: Given,
    *,
    title: str = "Continual learning",
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write `results.json`, then `report.md`, then the pictures, each atomically.

    The pictures are `accuracy_matrix.png` and `curves.png`; with several methods
    `stability_plasticity.png`, `importance.png` where the importance by layer is known, and
    `lambda_search.png` where λ was looked for. A report or a picture that cannot be made is a
    warning; results that cannot be kept are an error.

    Args:
        runs: for each method its runs, by seed or in a list: matrices or `Outcome`s.
        notes: sentences that the report opens with, in Markdown.
        details: whatever else belongs into results.json, such as the configuration (JSON types).

    Returns:
        The path of results.json.
    """
    path = write_results(Path(folder) / "results.json", runs, details)
    write_pages(folder, runs, title=title, notes=notes)
    return path


def write_pages(
    folder: str | os.PathLike[str],
    runs: Given,
    *,
    title: str = "Continual learning",
    notes: Sequence[str] = (),
) -> None:
    """Write `report.md` and the pictures alone, as `write_report` does."""
    folder, checked = Path(folder), as_runs(runs)
    _attempt(
        folder / "report.md",
        lambda: markdown(checked, title=title, notes=notes).encode(errors="replace"),
    )
    for name in pictures_of(checked):
        _attempt(folder / name, lambda name=name: _drawn(name, checked))  # type: ignore[misc]


def pictures_of(runs: Runs) -> list[str]:
    """The pictures there are to make, by their files' names."""
    left_out = set()
    if len(trade_offs(runs)) < 2:
        left_out.add("stability_plasticity.png")
    if not any(outcome.importance for r in runs.values() for outcome in r.values()):
        left_out.add("importance.png")
    if not any(outcome.searches for r in runs.values() for outcome in r.values()):
        left_out.add("lambda_search.png")
    return [name for name in PICTURES if name not in left_out]


def markdown(runs: Given, *, title: str = "Continual learning", notes: Sequence[str] = ()) -> str:
    """The report: notes, measures, costs, score tables, and the pictures that lie beside it."""
    checked = as_runs(runs)
    repetitions = max(len(repeats) for repeats in checked.values())
    parts = [f"# {in_markdown(title)}", *notes, summary_table(checked)]
    if repetitions > 1:
        parts.append(f"Mean ± standard error over {repetitions} seeds.")
    parts += ["Differences, seed by seed:", found] if (found := difference_table(checked)) else []
    parts += [found] if (found := cost_table(checked)) else []
    pictures = pictures_of(checked)
    if "stability_plasticity.png" in pictures:
        parts.append(_picture("stability_plasticity.png"))
        pictures.remove("stability_plasticity.png")
    for method, repeats in checked.items():
        parts += [f"## {in_markdown(method)}", score_table(matrices(repeats))]
    if found := search_table(checked):
        parts += ["## How λ was found", "Trials on the new task's training data alone:", found]
    parts += [_picture(name) for name in pictures]
    parts.append(in_words(environment()))
    return "\n\n".join(parts) + "\n"


def _picture(name: str) -> str:
    return f"![{PICTURES[name]}]({name})"


def _drawn(name: str, runs: Runs) -> bytes:
    # Imported here: a drawing library that is broken, too, costs no more than the pictures.
    from hf_ewc.report import pictures

    return pictures.draw(name, runs)


def _attempt(path: Path, make: Callable[[], bytes]) -> None:
    """Write what `make` returns; where that fails, warn, and leave nothing that is out of date."""
    try:
        write_atomically(path, make())
    except Exception as error:
        logger.warning("%s could not be made (%s: %s).", path, type(error).__name__, error)
        with suppress(OSError):
            path.unlink(missing_ok=True)
