"""What a task has done to the earlier ones, and what that says of λ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report.layers import layer_of
from hf_ewc.tasks.divergence import in_words

MUCH = 0.02  # of the best scores of earlier tasks: what is lost beyond it
SMALL = 0.1  # the penalty beside the task's loss, below which λ has room
NOTHING = 1e-6  # the same, below which there is no protection to speak of
MOST_LAYERS = 3


@dataclass(frozen=True)
class Aftermath:
    """What is measured at the end of a task that was held to earlier ones.

    Args:
        task: its name.
        score: of the task itself, as people read it (a perplexity above 0); None where there is no
            number.
        lost: mean share of their best scores that the earlier tasks have lost.
        penalty: λ/2 Σ F (θ − θ*)², that of L2-SP left out.
        task_loss: the last that was logged; None without logs.
        drift: √(Σ F (θ − θ*)²) by layer: how far its parameters moved in units of 1/√F. Half its
            square is about the divergence from the old model, in nats a label of the old tasks.
        kl: KL(before ‖ after) on the task's own data (`Divergence`); None where not asked for.
    """

    task: str
    score: float | None
    lost: float | None
    penalty: float
    task_loss: float | None
    drift: Mapping[str, float]
    kl: float | None = None

    @property
    def share(self) -> float | None:
        """The penalty beside the task's loss."""
        return self.penalty / abs(self.task_loss) if self.task_loss else None

    def advice(self) -> str:
        """What λ could be instead, as far as these figures tell."""
        if self.share is None or not math.isfinite(self.share):
            return ""
        forgets = self.lost is not None and self.lost > MUCH
        if self.share > 1.0:
            return "λ is too large: the penalty outweighs the task's own loss."
        if forgets and self.share < NOTHING:
            return (
                "The penalty is next to nothing: has the Fisher vanished, as on examples that are "
                "known by heart? Estimate it on others (fisher_data='held_out')."
            )
        if forgets and self.share < SMALL:
            return "λ could be ten times larger: the penalty is small beside the task's loss."
        return ""

    def in_words(self) -> str:
        """One line."""
        most = sorted(self.drift, key=lambda layer: -self.drift[layer])[:MOST_LAYERS]
        parts = [f"After {self.task!r}"]
        parts += [f"its score is {self.score:.4g}"] if self.score is not None else []
        if self.lost is not None:
            change = "lost" if self.lost >= 0 else "gained"
            parts.append(f"earlier tasks have {change} {100 * abs(self.lost):.1f} % of their best")
        layers = ", ".join(f"{layer} {self.drift[layer]:.2g}" for layer in most)
        parts.append(f"old parameters moved most in {layers} (units of 1/√F)")
        beside = "" if self.task_loss is None else f" beside a loss of {self.task_loss:.2g}"
        parts.append(f"the penalty is {self.penalty:.2g}{beside}")
        parts += [] if self.kl is None else [in_words(self.kl)]
        return f"{parts[0]}: {', '.join(parts[1:])}. {self.advice()}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def aftermath(
    matrix: AccuracyMatrix,
    index: int,
    squares: Mapping[str, float],
    lambdas: Mapping[str, float],
    log_history: Sequence[Mapping[str, Any]],
    kl: float | None = None,
) -> Aftermath:
    """What task `index` has come to.

    Args:
        squares: Σ F (θ − θ*)² by parameter, before the task was folded into the state.
        lambdas: λ by parameter.
        log_history: of the task's trainer.
        kl: KL(before ‖ after), where it was measured.
    """
    score = float(matrix.scores[index, index])
    losses = [entry["task_loss"] for entry in log_history if "task_loss" in entry]
    by_layer: dict[str, float] = {}
    for name, square in squares.items():
        by_layer[layer_of(name)] = by_layer.get(layer_of(name), 0.0) + square
    return Aftermath(
        matrix.tasks[index],
        None if math.isnan(score) else matrix.sign(matrix.tasks[index]) * score,
        lost_share(matrix, index),
        sum(0.5 * lambdas[name] * square for name, square in squares.items()),
        float(losses[-1]) if losses else None,
        {layer: math.sqrt(max(square, 0.0)) for layer, square in by_layer.items()},
        kl,
    )


def lost_share(matrix: AccuracyMatrix, index: int) -> float | None:
    """Mean over the tasks j before of (max_{i<index} R[i, j] − R[index, j]) / |max R[i, j]|."""
    before, now = matrix.scores[:index, :index], matrix.scores[index, :index]
    best = np.where(np.isnan(before), -np.inf, before).max(axis=0, initial=-np.inf)
    known = np.isfinite(best) & np.isfinite(now) & (best != 0)
    if not known.any():
        return None
    return float(np.mean((best[known] - now[known]) / np.abs(best[known])))
