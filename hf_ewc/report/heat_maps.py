"""R as a heat map, a panel for each method."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from hf_ewc.metrics import Array
from hf_ewc.report.axes import name_columns, name_rows, number_rows, width_of_names
from hf_ewc.report.canvas import panels
from hf_ewc.report.figures import figures, first_matrix
from hf_ewc.report.names import shortened
from hf_ewc.report.outcome import Runs

_MOST_NUMBERS = 600  # cells of a picture beyond which none has its number


def heat_maps(runs: Runs) -> Figure:
    """Means over the seeds: rows are tasks trained, columns tasks tested, lighter is better."""
    tasks, found = first_matrix(runs).tasks, figures(runs)
    size = len(tasks)
    has_numbers = size**2 * len(runs) <= _MOST_NUMBERS
    side = max(1.8, min(0.52 * size, 11.0) if has_numbers else min(0.25 * size, 5.5))
    room = 0.9 + width_of_names(tasks)
    figure, axes = panels(len(runs), side + 0.5, side + 0.9, beside=room + 1.3)
    norm = (LogNorm if found.is_logarithmic else Normalize)(*found.limits)
    colours = "viridis_r" if found.lower_is_better else "viridis"
    for panel, (method, values) in zip(axes, found.values.items(), strict=True):
        image = panel.imshow(values, norm=norm, cmap=colours)
        if has_numbers:
            _write_numbers(panel, values, image)
        panel.set_title(shortened(method))
        panel.set_xlabel("score on task")
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("after training on task")
            name_rows(panel, tasks)
        else:
            number_rows(panel, tasks)
        name_columns(panel, tasks)
    figure.colorbar(image, ax=axes, fraction=0.04, aspect=25, label=found.label)
    return figure


def _write_numbers(panel: Any, values: Array, image: Any) -> None:
    """Each cell's figure, in black on light colours and in white on dark ones."""
    for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
        red, green, blue, _ = image.cmap(image.norm(values[i, j]))
        is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        number = panel.text(
            j, i, _brief(values[i, j]), ha="center", va="center", fontsize=8,
            color="black" if is_light else "white",
        )  # fmt: skip
        number.set_in_layout(False)  # it stands inside its cell


def _brief(value: float) -> str:
    """At most five characters for all that is below a million."""
    if abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0e}".replace("e+0", "e")
