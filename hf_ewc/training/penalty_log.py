"""What training reports about the penalty: means between logs, layer groups, warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from hf_ewc.training.penalty import Penalty

logger = logging.getLogger("hf_ewc")
# Logs, and optimizer steps, in a row that the penalty outweighs the task before it is said.
LONG_WINDOWS, LONG_STEPS = 3, 50
# ‖θ − θ*‖ / ‖θ*‖ of a weight matrix above which it is another one than was consolidated.
FAR_FROM_ANCHOR = 1.0
# ‖θ − θ*‖ / ‖θ*‖ of any parameter up to which training starts at the anchor.
AT_ANCHOR = 0.01
# Names of sums that no group of layers has.
_VARYING, _CONSTANT = "(varying)", "(constant)"


class PenaltyLog:
    """Means of the penalty over the optimizer steps of one training run.

    The Trainer's own running loss holds the task loss alone; `amend` turns what it is about
    to log into `loss` = `task_loss` + `ewc_penalty`. Every rank has the same penalty, so
    means over ranks need nothing here.

    Args:
        names: the parameters whose values `add` gets.
        by_group: also log the penalty of each group of layers, `ewc_penalty/<group>`.
        former: the log of the same run so far, where the state has changed within it.
    """

    def __init__(
        self, names: Sequence[str], by_group: bool = False, former: PenaltyLog | None = None
    ) -> None:
        self._groups = [layer_group(name) for name in names] if by_group else []
        self._window: Tensor | None = None
        self._constants = 0.0
        self._steps: int = 0
        self._earlier: dict[str, float] = {} if former is None else former._so_far()
        self._earlier_steps: int = 0 if former is None else former._steps + former._earlier_steps
        self._total: float = 0.0 if former is None else former._total
        self._total_steps: int = 0 if former is None else former._total_steps
        self._outweighing: _Outweighing = _Outweighing() if former is None else former._outweighing

    def add(self, values: Tensor, constant: float = 0.0) -> None:
        """Take in the λ-weighted value of each parameter at one optimizer step; no host sync.

        Args:
            values: one for each name.
            constant: the part of the penalty that no parameter changes.
        """
        self._window = values if self._window is None else self._window + values
        self._constants += constant
        self._steps += 1

    def amend(self, logs: dict[str, float]) -> None:
        """Turn the task losses in `logs` into losses, and add `task_loss`, `ewc_penalty`.

        Logs without `loss` or `train_loss` (evaluation) stay as they are.
        """
        if "loss" in logs and self._steps + self._earlier_steps:
            self._amend_window(logs)
        if "train_loss" in logs:
            self._drain()
            logs["train_loss"] += self._total / max(self._total_steps, 1)

    def _amend_window(self, logs: dict[str, float]) -> None:
        steps = self._steps + self._earlier_steps
        means = {name: value / steps for name, value in self._drain().items()}
        varying = means.pop(_VARYING)
        logs["task_loss"] = logs["loss"]
        logs["ewc_penalty"] = varying + means.pop(_CONSTANT)
        logs["loss"] = logs["task_loss"] + logs["ewc_penalty"]
        logs.update({f"ewc_penalty/{group}": value for group, value in means.items()})
        self._outweighing.watch(varying, logs["task_loss"], steps)

    def _so_far(self) -> dict[str, float]:
        """The sums since the last log: what varies, what does not, and by group of layers."""
        values: list[float] = [] if self._window is None else self._window.tolist()
        found = {_VARYING: 0.0, _CONSTANT: 0.0, **self._earlier}
        found[_VARYING] += sum(values)
        found[_CONSTANT] += self._constants
        for group, value in zip(self._groups, values, strict=False):
            found[group] = found.get(group, 0.0) + value
        return found

    def _drain(self) -> dict[str, float]:
        """What `_so_far` has; adds it to the run's total and begins the next window."""
        found = self._so_far()
        self._total += found[_VARYING] + found[_CONSTANT]
        self._total_steps += self._steps + self._earlier_steps
        self._window, self._constants, self._steps = None, 0.0, 0
        self._earlier, self._earlier_steps = {}, 0
        return found


class _Outweighing:
    """Warns once when the penalty is above the task loss over three logs and fifty steps in a row.

    The offset, which nothing in training changes, is not counted.
    """

    def __init__(self) -> None:
        self._windows = self._steps = 0
        self._warned = False

    def watch(self, penalty: float, task_loss: float, steps: int) -> None:
        if not math.isfinite(penalty):
            if not self._warned:
                self._warned = True
                logger.warning(
                    "The EWC penalty is %s: the steps are too long for it. Plain gradient descent "
                    "overshoots where learning rate × λ × F is above 2. Lower ewc_lambda or the "
                    "learning rate, or clip gradients (max_grad_norm).",
                    penalty,
                )
            return
        if not penalty > abs(task_loss):
            self._windows = self._steps = 0
            return
        self._windows += 1
        self._steps += steps
        if self._warned or self._windows < LONG_WINDOWS or self._steps < LONG_STEPS:
            return
        self._warned = True
        logger.warning(
            "The EWC penalty (%.3g) has outweighed the task loss (%.3g) for %d steps: the model is "
            "held back more than it learns. Lower ewc_lambda, or check that the new task's labels "
            "and learning rate are right.",
            penalty,
            task_loss,
            self._steps,
        )


def warn_about(penalty: Penalty, at_anchor: bool) -> None:
    """Warn about a penalty that protects nothing, or whose anchor is another model.

    The quadratic is a second-order expansion around θ*. A weight matrix with ‖θ − θ*‖ > ‖θ*‖ as
    training starts is not near θ* in any sense (two independent random ones are √2 apart), so it is
    not the one that was consolidated.

    Args:
        penalty: as training starts.
        at_anchor: whether θ = θ* is expected, as at the beginning of a task in online mode.
    """
    if warn_of_nothing(penalty):
        return
    distances = penalty.relative_distances()
    far = [
        term.name
        for term, distance in distances
        # An anchor of zeros, as of a fresh adapter's B, has no norm to compare with.
        if FAR_FROM_ANCHOR < distance < math.inf and term.is_matrix
    ]
    if far:
        logger.warning(
            "The EWC anchor of %d of %d parameters (%s) is far from the model: by more than its "
            "own norm, where the quadratic penalty means nothing. Start from the weights that were "
            "consolidated; what was replaced, such as a head, is given up by state.without.",
            len(far),
            len(distances),
            ", ".join(far[:3]) + (", …" if len(far) > 3 else ""),
        )
        return
    name, distance = max(((t.name, d) for t, d in distances), key=lambda pair: pair[1])
    if at_anchor and distance > AT_ANCHOR:
        logger.warning(
            "Training does not start from the weights that were consolidated: %s is %s, and the "
            "penalty is %.3g already. Start from the model as it was after the last task.",
            name,
            "no longer at its EWC anchor, which is 0"
            if math.isinf(distance)
            else f"{distance:.2g} times its norm away from the EWC anchor",
            penalty.value(),
        )


def warn_of_nothing(penalty: Penalty) -> bool:
    """Warn about a penalty that protects nothing; whether it is one."""
    if penalty.is_zero:
        logger.warning(
            "The EWC state protects nothing: the importance of every trainable parameter is zero, "
            "or its λ. Was it estimated on data with labels, on the parameters that are trained "
            "now? A PEFT adapter loaded without is_trainable=True is frozen."
        )
    return penalty.is_zero


def layer_group(name: str) -> str:
    """The layer of a parameter: its name up to the first number, else its module's first two parts.

    >>> layer_group("bert.encoder.layer.3.output.dense.weight")
    'bert.encoder.layer.3'
    >>> layer_group("bert.embeddings.word_embeddings.weight")
    'bert.embeddings'
    >>> layer_group("classifier.bias")
    'classifier'
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1][:2]) or name
