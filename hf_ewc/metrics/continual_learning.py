"""The measures of a sequence of tasks as a module of `evaluate`, which needs no network.

import evaluate
from hf_ewc.metrics import continual_learning

measures = evaluate.load(continual_learning.__file__)
measures.compute(scores=[[0.9, None], [0.5, 0.8]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_ewc.metrics import AccuracyMatrix

_INPUTS = """
Args:
    scores: R, row by row: R[i][j] is the score on task j after training task i, of which more is
        better; None where it was not measured. Rows may end behind the tasks learnt.
    tasks: their names; by default "task 1", "task 2" and so on.
    baseline: scores by task of the untrained model, which forward transfer needs.
    joint: scores by task of models trained jointly, which intransigence needs.
    after: the task (number from 0, or name) up to which to count; by default the last one learnt.
Returns:
    average_accuracy, backward_transfer, forward_transfer, forgetting, learning_accuracy and
    intransigence; those that the scores do not allow are left out.
Examples:
    >>> measures.compute(scores=[[0.9, None], [0.5, 0.8]])["forgetting"]
    0.4
"""
_PAPERS = """
Lopez-Paz & Ranzato 2017, Gradient episodic memory, arXiv 1706.08840
Chaudhry et al. 2018, Riemannian walk, arXiv 1801.10112
Riemer et al. 2019, Learning to learn without forgetting, arXiv 1810.11910
"""


class ContinualLearning(evaluate.Metric):  # type: ignore[misc]
    """The measures of `AccuracyMatrix`, computed from R."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=AccuracyMatrix.__doc__,
            citation=_PAPERS,
            inputs_description=_INPUTS,
            features=datasets.Features({"scores": row}),
        )

    def _compute(
        self,
        scores: Sequence[Sequence[float | None]],
        tasks: Sequence[str] | None = None,
        baseline: Sequence[float] | Mapping[str, float] | None = None,
        joint: Sequence[float] | Mapping[str, float] | None = None,
        after: int | str | None = None,
    ) -> dict[str, Any]:
        """The measures by name, see `_INPUTS`."""
        whole = np.full((len(scores), len(scores)), np.nan)
        for i, row in enumerate(scores):
            if len(row) > len(scores):
                raise ValueError(f"row {i} has {len(row)} scores for {len(scores)} tasks.")
            whole[i, : len(row)] = np.array(row, dtype=np.float64)
        names = tasks or [f"task {i + 1}" for i in range(len(scores))]
        matrix = AccuracyMatrix(names, whole, baseline=baseline, joint=joint)
        return matrix.summary(after)
