"""Importance by layer, drawn."""

from __future__ import annotations

from matplotlib.figure import Figure

from hf_ewc.report.canvas import palette, panels, text_width
from hf_ewc.report.layers import MOST_LAYERS, most_important
from hf_ewc.report.names import shortened
from hf_ewc.report.outcome import Runs


def importance(runs: Runs) -> Figure:
    """A panel for each method that has importances: each layer's share of Σ F, first seed."""
    known = {
        method: found
        for method, repeats in runs.items()
        if (found := next((o.importance for o in repeats.values() if o.importance), None))
    }
    longest = max(len(layers) for layers in known.values())
    rows = min(longest, MOST_LAYERS)
    names = [shortened(name) for layers in known.values() for name in layers]
    figure, axes = panels(len(known), 3.4 + text_width(names), max(2.2, 0.23 * rows + 1.2))
    for panel, (method, layers) in zip(axes, known.items(), strict=True):
        shown = most_important(layers)
        total = sum(layer.total for layer in layers.values()) or 1.0
        shares = [100 * layer.total / total for layer in shown.values()]
        panel.barh(range(len(shown)), shares, color=palette(1)[0])
        for i, share in enumerate(shares):
            percent = panel.annotate(
                f"{share:.1f} %", (share, i), (3, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
            percent.set_in_layout(False)  # there is room for it, and the layout is faster
        panel.set_yticks(range(len(shown)), [shortened(name) for name in shown])
        panel.invert_yaxis()
        panel.set_xlim(0, 1.22 * max([*shares, 1e-9]))
        panel.set_xlabel("share of the importance Σ F (%)")
        panel.set_title(shortened(method))
    return figure
