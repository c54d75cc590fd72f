"""Scores as they are drawn: the figures people know, on one scale for all methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hf_ewc.metrics import AccuracyMatrix, Array
from hf_ewc.report.outcome import Runs, matrices
from hf_ewc.report.statistics import mean_scores

_LOGARITHMIC = 50.0  # ratio of the largest figure to the smallest from which a log scale shows more


@dataclass(frozen=True)
class Figures:
    """What pictures show of R, means over seeds, by method.

    Args:
        values: (T, T) each, NaN where not measured.
        label: of the axis they stand on.
        limits: the ends of that axis.
        lower_is_better: for all tasks.
        is_logarithmic: whether the axis is to be.
    """

    values: Mapping[str, Array]
    label: str
    limits: tuple[float, float]
    lower_is_better: bool = False
    is_logarithmic: bool = False


def figures(runs: Runs) -> Figures:
    """Scores, or figures of which less is better, or, for tasks of both kinds, a common scale.

    That scale goes from the worst that any method had on a task (0) to the best (1).
    """
    matrix = first_matrix(runs)
    means = {method: mean_scores(matrices(repeats))[0] for method, repeats in runs.items()}
    signs = set(matrix.signs)
    if len(signs) > 1:
        label = "from the worst on each task (0) to the best (1)"
        return Figures(_between_worst_and_best(means), label, (0.0, 1.0))
    if signs == {1}:
        return Figures(means, "score", _limits(means))
    values = {method: -mean for method, mean in means.items()}
    names = set(matrix.lower_is_better.values())
    label = f"{names.pop() if len(names) == 1 else 'score'} (lower is better)"
    low, high = _limits(values)
    is_wide = low > 0 and high / low > _LOGARITHMIC
    return Figures(values, label, (low, high), True, is_wide)


def first_matrix(runs: Runs) -> AccuracyMatrix:
    return matrices(next(iter(runs.values())))[0]


def _between_worst_and_best(means: Mapping[str, Array]) -> dict[str, Array]:
    stack = np.stack(list(means.values()))
    low = np.nanmin(np.where(np.isnan(stack), np.inf, stack), axis=(0, 1))
    high = np.nanmax(np.where(np.isnan(stack), -np.inf, stack), axis=(0, 1))
    span = np.where(high > low, high - low, 1.0)
    return {method: (mean - low) / span for method, mean in means.items()}


def _limits(means: Mapping[str, Array]) -> tuple[float, float]:
    """From 0 to 1 for accuracies, otherwise as far as the figures go."""
    values = np.concatenate([mean[~np.isnan(mean)] for mean in means.values()])
    if not values.size or (values.min() >= 0 and values.max() <= 1):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)
