"""Stability against plasticity: forgetting against learning accuracy, one point a method."""

from __future__ import annotations

from matplotlib.figure import Figure

from hf_ewc.report.canvas import marker, palette, panels, text_width
from hf_ewc.report.figures import first_matrix
from hf_ewc.report.names import in_legend, shortened
from hf_ewc.report.outcome import Runs
from hf_ewc.report.statistics import trade_offs


def trade_off(runs: Runs) -> Figure:
    """Means over the seeds with their standard errors; methods to the lower right are better.

    Where lower scores are better, so is the left. Methods without the two measures are left out.
    """
    matrix, points = first_matrix(runs), trade_offs(runs)
    names = [in_legend(shortened(method)) for method in points]
    figure, (panel,) = panels(1, 5.0, max(3.8, 0.22 * len(names) + 1.0), text_width(names) + 0.6)
    for index, (x, y) in enumerate(points.values()):
        panel.errorbar(
            x.mean, y.mean, xerr=x.error, yerr=y.error, label=names[index],
            color=palette(len(points))[index], marker=marker(index), markersize=8, capsize=3,
            linestyle="none", elinewidth=1,
        )  # fmt: skip
    is_lower = set(matrix.signs) == {-1}
    figures = set(matrix.lower_is_better.values())
    learnt = f"{figures.pop() if len(figures) == 1 else 'score'} when learnt"
    right = f"{learnt}  (plasticity: left is better)" if is_lower else (
        "learning accuracy  (plasticity: right is better)"
    )  # fmt: skip
    panel.set_xlabel(right)
    panel.set_ylabel("forgetting  (stability: down is better)")
    panel.margins(0.15)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure
