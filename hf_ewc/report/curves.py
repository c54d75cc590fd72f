"""The score on each task as training goes from task to task, a panel for each method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hf_ewc.metrics import Array
from hf_ewc.report.axes import name_columns, shown_names
from hf_ewc.report.canvas import line, logarithmic, marker, palette, panels, text_width
from hf_ewc.report.figures import Figures, figures, first_matrix
from hf_ewc.report.names import in_legend, shortened
from hf_ewc.report.outcome import Runs

_MOST_NAMES = 24  # tasks beyond which a colour bar takes the place of the legend
_MOST_MARKERS = 12  # tasks beyond which points would hide the lines


def curves(runs: Runs) -> Figure:
    """Means over the seeds, each task from where it was learnt on, and their average in black."""
    tasks, found = first_matrix(runs).tasks, figures(runs)
    names = [in_legend(name) for name in shown_names(tasks)]
    has_legend = len(tasks) <= _MOST_NAMES
    width = min(max(3.2, 0.25 * len(tasks) + 1.5), 5.5)
    height = max(3.4, (0.2 * len(tasks) + 1.0) / -(-len(runs) // 3) if has_legend else 0)
    beside = text_width([*names, "average"]) + 0.9 if has_legend else 0.9
    figure, axes = panels(len(runs), width, height, beside=beside)
    for panel, (method, values) in zip(axes, found.values.items(), strict=True):
        _draw_tasks(panel, values, names)
        _draw_average(panel, values)
        panel.set_title(shortened(method))
        panel.set_xlabel("after training on task")
        panel.set_ylabel(found.label)
        _set_limits(panel, found)
        name_columns(panel, tasks)
    if has_legend:
        handles, labels = axes[0].get_legend_handles_labels()
        legend = figure.legend(
            handles, labels, loc="outside right upper", fontsize=9, title="score on task"
        )
        legend.set_alignment("left")
    else:
        scale = ScalarMappable(Normalize(1, len(tasks) / 0.92), "viridis")
        bar = figure.colorbar(scale, ax=axes, label="score on task (number); average in black")
        bar.ax.set_ylim(1, len(tasks))
    return figure


def _draw_tasks(panel: Any, values: Array, names: Sequence[str]) -> None:
    """A line for each task, with its own colour, marker and kind of line."""
    size = len(names)
    few = size <= _MOST_MARKERS
    for j, (name, colour) in enumerate(zip(names, palette(size), strict=True)):
        panel.plot(
            range(j, size), values[j:, j], label=name, color=colour,
            linestyle=line(j) if size <= _MOST_NAMES else "-",
            linewidth=1.3 if few else 1.0,
            marker=marker(j), markersize=4 if few else 3,
            # The first point only: where the task was learnt.
            markevery=1 if few else [0],
        )  # fmt: skip


def _draw_average(panel: Any, values: Array) -> None:
    seen = [np.mean(values[i, : i + 1]) for i in range(len(values))]
    panel.plot(range(len(values)), seen, color="black", linewidth=2.2, label="average", zorder=3)


def _set_limits(panel: Any, found: Figures) -> None:
    low, high = found.limits
    known = np.concatenate([values[~np.isnan(values)] for values in found.values.values()])
    if (low, high) == (0.0, 1.0) and known.size:  # accuracies: to full tenths
        low = min(0.9, np.floor(10 * known.min()) / 10)
    if found.is_logarithmic:
        logarithmic(panel, "y")
        panel.set_ylim(low / 1.2, high * 1.2)
        return
    margin = 0.04 * (high - low)
    panel.set_ylim(low - margin, high + margin)
