"""Means over seeds, their standard errors, and differences between methods seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hf_ewc.metrics import AccuracyMatrix, Array
from hf_ewc.report.outcome import Outcome, Runs, matrices

LABELS = {
    "average_accuracy": "average accuracy (ACC)",
    "backward_transfer": "backward transfer (BWT)",
    "forward_transfer": "forward transfer (FWT)",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy (LA)",
    "intransigence": "intransigence",
}

# What is a level of the scores rather than a difference between two.
LEVELS = ("average_accuracy", "learning_accuracy")


class Estimate(NamedTuple):
    """A mean over n seeds and the deviation of one seed from it (n - 1; 0 for one seed)."""

    mean: float
    std: float
    seeds: int

    @property
    def error(self) -> float:
        """The standard error of the mean, std / √n."""
        return float(self.std / np.sqrt(self.seeds))


def estimate(values: Sequence[float]) -> Estimate:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Estimate(float(np.mean(values)), spread, len(values))


def summarize(repeats: Sequence[AccuracyMatrix]) -> dict[str, Estimate]:
    """The measures that all repetitions have."""
    summaries = [matrix.summary() for matrix in repeats]
    shared = [name for name in LABELS if all(name in summary for summary in summaries)]
    return {name: estimate([summary[name] for summary in summaries]) for name in shared}


def mean_scores(repeats: Sequence[AccuracyMatrix]) -> tuple[Array, Array]:
    """Mean and standard error of R over repetitions, each (T, T), NaN where not measured."""
    stack = np.stack([matrix.scores for matrix in repeats])
    mean = stack.mean(axis=0)
    if len(stack) == 1:
        return mean, np.where(np.isnan(mean), np.nan, 0.0)
    return mean, stack.std(axis=0, ddof=1) / np.sqrt(len(stack))


def reference_of(runs: Runs) -> str | None:
    """The method that others are compared with: the first whose name begins with "plain"."""
    return next((method for method in runs if method.lower().startswith("plain")), None)


def differences(
    repeats: Mapping[int, Outcome], reference: Mapping[int, Outcome]
) -> dict[str, Estimate]:
    """Each measure minus the reference's, seed by seed, over the seeds that both ran with.

    What all methods owe to a seed (its initial weights, its order of data) cancels, so that the
    standard error is that of the methods' difference alone.
    """
    seeds = [seed for seed in repeats if seed in reference]
    pairs = [(repeats[s].matrix.summary(), reference[s].matrix.summary()) for s in seeds]
    shared = [name for name in LABELS if pairs and all(name in a and name in b for a, b in pairs)]
    return {name: estimate([a[name] - b[name] for a, b in pairs]) for name in shared}


def shown_summary(matrix: AccuracyMatrix, summary: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """As figures: levels with the sign they are known by, and none over figures of both kinds."""
    signs = set(matrix.signs)
    if len(signs) > 1:
        return {name: found for name, found in summary.items() if name not in LEVELS}
    if signs == {1}:
        return dict(summary)
    return {
        name: found._replace(mean=-found.mean) if name in LEVELS else found
        for name, found in summary.items()
    }


def trade_offs(runs: Runs) -> dict[str, tuple[Estimate, Estimate]]:
    """Learning accuracy and forgetting, of the methods that have both."""
    found = {}
    for method, repeats in runs.items():
        summary = summarize(matrices(repeats))
        shown = shown_summary(matrices(repeats)[0], summary)
        if {"learning_accuracy", "forgetting"} <= shown.keys():
            found[method] = (shown["learning_accuracy"], shown["forgetting"])
    return found
