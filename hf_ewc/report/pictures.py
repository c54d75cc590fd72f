"""The pictures of a report: heat maps, curves, stability against plasticity, importance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from matplotlib.figure import Figure

from hf_ewc.report import canvas
from hf_ewc.report.curves import curves
from hf_ewc.report.heat_maps import heat_maps
from hf_ewc.report.importance import importance
from hf_ewc.report.lambda_search import lambda_search
from hf_ewc.report.outcome import Runs
from hf_ewc.report.trade_off import trade_off

_FIGURES: dict[str, Callable[[Runs], Figure]] = {
    "accuracy_matrix.png": heat_maps,
    "curves.png": curves,
    "stability_plasticity.png": trade_off,
    "importance.png": importance,
    "lambda_search.png": lambda_search,
}


def draw(name: str, runs: Runs) -> bytes:
    """The PNG of this name. Pictures with a panel for each method show the first twelve."""
    if name != "stability_plasticity.png":
        runs = dict(islice(runs.items(), canvas.MOST_PANELS))
    return canvas.draw(lambda: _FIGURES[name](runs))
