"""What a model's own loss says of its likelihood: the loss on some labels beside −log p of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ewc.fisher.labels import Batch
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.fisher.likelihood.forward import Outputs

# Reads p(y | x) off outputs and the batch that they come from.
Read = Callable[[Outputs, Batch], Distribution]

# Largest relative difference between a loss and −log p that rounding explains.
_ROUNDING, _HALF_ROUNDING = 2e-5, 2e-2
# The same where the loss is in float32 and the outputs that it was made of are not.
_MIXED_ROUNDING = 1e-3
# Factors that losses carry: a square without its ½ has 2. Any other has to be seen to be constant,
# on values of −log p that differ by this much more than rounding.
_FACTORS = (1.0, 2.0, 0.5)
_SPREAD = 50


@dataclass(frozen=True)
class Observation:
    """The model's loss on a batch, some of whose labels may be made up."""

    batch: Batch
    outputs: Outputs
    loss: float


@dataclass(frozen=True)
class StatedLoss:
    """What a loss beside the model comes to on a batch, such as a trainer's.

    Args:
        batch: as the model gets it, with its labels.
        loss: of these labels, 0-dim.
        kept_back: what the loss may be of besides, which the model does not get.
    """

    batch: Batch
    loss: Tensor
    kept_back: tuple[str, ...] = ()

    def beside(self, outputs: Outputs) -> Observation:
        """The loss as if the forward with these outputs had come to it."""
        names = ("logits", "prediction_logits", "start_logits", "end_logits")
        scores = {name: outputs.named(name) for name in names}
        found = {"loss": self.loss, **scores, "logits": outputs.logits}
        return Observation(self.batch, Outputs(found, outputs.ctc), float(self.loss))


def rounding(observations: Sequence[Observation]) -> float:
    """How far a loss may be from −log p, relative to it, by the precision of the two."""
    outputs = observations[0].outputs
    if outputs.loss is None or outputs.loss.element_size() < 4:
        return _HALF_ROUNDING
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    half = any(scores.element_size() < 4 for scores in outputs.scores)
    return _MIXED_ROUNDING if half or autocast else _ROUNDING


@torch.no_grad()
def misfit(
    read: Read, observations: Sequence[Observation], tolerance: float, *, further_term: bool
) -> float:
    """How far the losses are from a constant times −log p: the largest relative error; ≥ 0.

    The constant may be the number of labels, of examples, or any other.

    Args:
        further_term: whether the loss may have a term that does not depend on the labels, such as a
            router's, beside the mean of −log p over labels. It takes three observations to see
            that. Beside a multiple of it, it could not be told from logits with a factor in the
            loss: −log softmax(k l) and −k log softmax(l) differ by such a term.
    """
    losses = torch.tensor([o.loss for o in observations], dtype=torch.float64)
    try:
        stated = [_stated(read, o) for o in observations]
    except ValueError:  # labels that are none of this likelihood
        return math.inf
    errors = [math.inf]
    for number, row in enumerate(zip(*stated, strict=True)):
        values = torch.tensor(row, dtype=torch.float64)
        if not values.isfinite().all():
            continue
        errors.append(_misfit(losses, values, tolerance))
        if number == 0 and further_term and errors[-1] > tolerance and len(losses) > 2:
            errors.append(_without_constant(losses, values, tolerance))
    return min(errors)


def _stated(read: Read, observed: Observation) -> list[float]:
    losses = read(observed.outputs, observed.batch).losses()
    return [float(loss) for loss in losses]


def _misfit(losses: Tensor, values: Tensor, tolerance: float) -> float:
    scale = float(losses.abs().max())
    if scale == 0.0:
        return float(values.abs().max())
    factors = [*_FACTORS]
    if float(values.std(correction=0)) > _SPREAD * tolerance * float(values.abs().max()):
        factors.append(float((losses @ values) / (values @ values).clamp_min(1e-300)))
    return min(float((losses - factor * values).abs().max()) / scale for factor in factors)


def _without_constant(losses: Tensor, values: Tensor, tolerance: float) -> float:
    """How far differences between observations are apart, where they are large enough to tell.

    A regularizer is at least 0. What a linear score or a margin lacks to −log p, log Σ exp of the
    logits, does not depend on the labels either; there the loss is less than −log p.
    """
    if float((losses - values).mean()) < 0.0:
        return math.inf
    losses, values = losses - losses.mean(), values - values.mean()
    scale = float(losses.abs().max())
    if scale < _SPREAD * tolerance * float(values.abs().max() + scale):
        return math.inf
    return float((losses - values).abs().max()) / scale / 10
