"""The diagonal Fisher information as a plain value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ewc.parameters.sharding import local_part, whole
from hf_ewc.precision import wide_sum

FISHER_TYPES = ("exact", "sampled", "empirical", "batched")


@dataclass(frozen=True, eq=False)
class Fisher:
    """The diagonal Fisher information of a model on one data set.

    F_i = (1/N) Σ_n E_y[(∂ log p(y | x_n, θ) / ∂θ_i)²]   (Kirkpatrick et al. 2017, arXiv 1612.00796;
    the variants of the expectation over y: van de Ven 2025, arXiv 2502.11756)

    Args:
        diagonal: F by parameter name, each shaped as its parameter, fp32, a mean over examples;
            DTensors where the parameters are.
        num_examples: N, the examples that were counted (those with at least one labelled position).
        fisher_type: how the expectation was taken: "exact", "sampled", "empirical" or "batched".
        labels_per_example: T, the mean number of labels of an example, over which log p is a sum:
            1 for a classifier, the labelled tokens of a sequence for a language model. Losses are
            means over labels, so a state holds F / T.
        confidence: the mean over the labels of max_c p(c | x), which is 1 where the model is sure
            of all of them, and F near 0; None where labels are no classes, or it is not known.

    Raises:
        ValueError: an entry is below zero or not finite, N or T is below 1, the type is unknown,
            the confidence no share.
        TypeError: an entry is not a floating-point tensor.
    """

    diagonal: Mapping[str, Tensor]
    num_examples: int = 1
    fisher_type: str = "exact"
    labels_per_example: float = 1.0
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.fisher_type not in FISHER_TYPES:
            raise ValueError(
                f"fisher_type is {self.fisher_type!r}; allowed are {', '.join(FISHER_TYPES)}."
            )
        if not isinstance(self.num_examples, int) or self.num_examples < 1:
            raise ValueError(
                f"num_examples is {self.num_examples!r}; it must be at least one example."
            )
        if not 1.0 <= self.labels_per_example < math.inf:
            raise ValueError(
                f"labels_per_example is {self.labels_per_example!r}; an example that counts has at "
                "least one label."
            )
        if self.confidence is not None and not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"confidence is {self.confidence!r}; a probability is in 0 to 1.")
        if not isinstance(self.diagonal, Mapping):
            raise TypeError(
                f"diagonal is a {type(self.diagonal).__name__}; needed is a dict of tensors by "
                "parameter name."
            )
        checked = {name: _checked(name, value) for name, value in self.diagonal.items()}
        object.__setattr__(self, "diagonal", checked)

    @property
    def trace(self) -> float:
        """Σ_i F_i; where the tensors are in shards a collective."""
        return sum(float(whole(wide_sum(value))) for value in self.diagonal.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fisher):
            return NotImplemented
        return (
            (self.num_examples, self.fisher_type, self.labels_per_example, self.confidence)
            == (other.num_examples, other.fisher_type, other.labels_per_example, other.confidence)
            and self.diagonal.keys() == other.diagonal.keys()
            and all(torch.equal(f, other.diagonal[name]) for name, f in self.diagonal.items())
        )

    __hash__ = None  # type: ignore[assignment]


def _checked(name: str, value: Tensor) -> Tensor:
    if not isinstance(name, str):
        raise TypeError(f"Fisher has the name {name!r}; a parameter's name is a string.")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"Fisher of {name!r} must be a floating-point tensor, got {value!r:.80}.")
    if value.layout != torch.strided or value.is_meta:
        kind = "on the meta device, without values" if value.is_meta else f"{value.layout}"
        raise TypeError(f"Fisher of {name!r} is {kind}; needed is a dense tensor.")
    value = value.detach()
    local = local_part(value).float()
    low, high = local.aminmax() if local.numel() else (torch.zeros(()), torch.zeros(()))
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError(f"Fisher of {name!r} has values that are not finite; check the estimate.")
    if low < 0:
        raise ValueError(
            f"Fisher of {name!r} holds {low.item():.3g}; a mean of squares is never below 0."
        )
    return value.float()
