"""Score of the new task against λ, for each task before which λ was looked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_ewc.report.canvas import logarithmic, marker, palette, panels, text_width
from hf_ewc.report.names import in_legend, shortened
from hf_ewc.report.outcome import Runs, figure_of

_PLAIN = 0.1  # where plain training stands on the logarithmic axis, below every λ


def lambda_search(runs: Runs) -> Figure:
    """A panel for each method with searches, those of its first seed; what was used is ringed."""
    found = {method: _first(repeats) for method, repeats in runs.items()}
    found = {method: searches for method, searches in found.items() if searches}
    names = [in_legend(search["task"]) for searches in found.values() for search in searches]
    figure, axes = panels(len(found), 4.0, 3.4, beside=text_width(names) + 0.6)
    for panel, (method, searches) in zip(axes, found.items(), strict=True):
        for index, search in enumerate(searches):
            _draw(panel, search, index, palette(len(searches))[index])
        logarithmic(panel, "x")
        panel.set_title(shortened(method))
        panel.set_xlabel("λ (plain training on the left)")
        less = " (less is better)" if all(s.get("by_improvement") for s in searches) else ""
        panel.set_ylabel(f"score on held-out examples{less}")
        panel.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, title="before task")
    return figure


def _first(repeats: Mapping[int, Any]) -> list[Mapping[str, Any]]:
    return next((list(outcome.searches) for outcome in repeats.values() if outcome.searches), [])


def _draw(panel: Any, search: Mapping[str, Any], index: int, colour: Any) -> None:
    trials = sorted(search["trials"], key=lambda trial: float(trial["ewc_lambda"]))
    points = [
        (trial["ewc_lambda"] or _PLAIN, figure_of(trial, search))
        for trial in trials
        if trial["score"] is not None
    ]
    panel.plot(
        *zip(*points, strict=True) if points else ([], []), color=colour, marker=marker(index),
        markersize=4, linewidth=1.2, label=in_legend(search["task"]),
    )  # fmt: skip
    if points and search["chosen"] is not None:
        used = float(search["chosen"])
        tried, scores = zip(*points, strict=True)
        panel.plot(
            used, np.interp(np.log10(used), np.log10(tried), scores), marker="o", markersize=11,
            color=colour, markerfacecolor="none", linestyle="none",
        )  # fmt: skip
