"""Importance by layer, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from hf_ewc.report.canvas import palette, panels, text_width
from hf_ewc.report.layers import MOST_LAYERS, most_important
from hf_ewc.report.names import shortened
from hf_ewc.report.outcome import Outcome, Runs


def importance(runs: Runs) -> Figure:
    """A panel for each method that has importances: each layer's share of Σ F, mean over seeds."""
    most = MOST_LAYERS if len(runs) <= 3 else MOST_LAYERS // 2
    known = {method: found for method, repeats in runs.items() if (found := _shares(repeats, most))}
    rows = max(len(shares) for shares in known.values())
    names = [shortened(name) for shares in known.values() for name in shares]
    figure, axes = panels(len(known), 3.4 + text_width(names), max(2.2, 0.23 * rows + 1.2))
    for panel, (method, shares) in zip(axes, known.items(), strict=True):
        _draw(panel, shares)
        panel.set_title(shortened(method))
    return figure


def _shares(repeats: Mapping[int, Outcome], most: int) -> dict[str, float]:
    """Per cent of Σ F by layer; of many layers the most important ones, and the others as one."""
    found = [outcome.importance for outcome in repeats.values() if outcome.importance]
    if not found:
        return {}
    layers = [most_important(each, most) for each in found]
    totals = [sum(layer.total for layer in each.values()) or 1.0 for each in layers]
    return {
        name: 100
        * sum(
            each[name].total / total
            for each, total in zip(layers, totals, strict=True)
            if name in each
        )
        / len(layers)
        for name in dict.fromkeys(name for each in layers for name in each)
    }


def _draw(panel: Any, shares: Mapping[str, float]) -> None:
    """Bars with their figures behind them."""
    panel.barh(range(len(shares)), list(shares.values()), color=palette(1)[0])
    for i, share in enumerate(shares.values()):
        percent = panel.annotate(
            f"{share:.1f} %", (share, i), (3, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
        percent.set_in_layout(False)  # there is room for it, and the layout is faster
    panel.set_yticks(range(len(shares)), [shortened(name) for name in shares])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.22 * max([*shares.values(), 1e-9]))
    panel.set_xlabel("share of the importance Σ F (%)")
