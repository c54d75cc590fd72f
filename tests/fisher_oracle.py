"""The Fisher by definition: one example at a time, in float64, with labels enumerated.

Shares no code with the library: plain autograd, plain loops.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn


def example(batch: dict[str, Any], n: int) -> dict[str, Any]:
    return {name: value[n : n + 1] for name, value in batch.items()}


def double(batch: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}


def log_probabilities(model: nn.Module, batch: dict[str, Any], shift: bool) -> Tensor:
    """(positions, classes) of the labelled positions of one example, and their labels."""
    inputs = dict(batch)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = inputs["labels"]
    if "decoder_input_ids" not in inspect.signature(base.forward).parameters:
        inputs.pop("labels")
    logits = model(**inputs).logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = logits.reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1)
    kept = labels != -100
    return logits[kept].log_softmax(-1), labels[kept]


def empirical(model: nn.Module, batch: dict[str, Any], shift: bool = False) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ Σ_t log p(y_nt | x_n))²."""
    return _mean_of_squares(
        model, batch, lambda m, one: [_true_score(*log_probabilities(m, one, shift))]
    )


def exact(model: nn.Module, batch: dict[str, Any], shift: bool = False) -> dict[str, Tensor]:
    """(1/N) Σ_n Σ_t Σ_c p(c) (∂ log p(c))²: positions are independent given the prefix."""
    return _mean_of_squares(
        model, batch, lambda m, one: _enumerated(log_probabilities(m, one, shift)[0])
    )


def _true_score(logp: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    return 1.0, logp.gather(1, labels[:, None]).sum()


def _enumerated(logp: Tensor) -> list[tuple[float, Tensor]]:
    return [(float(value.detach().exp()), value) for value in logp.reshape(-1)]


def _mean_of_squares(model: nn.Module, batch: dict[str, Any], terms: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double().eval()
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")  # grouped products have no float64
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    batch = double(batch)
    counted = 0
    for n in range(batch["labels"].shape[0]):
        weighted = terms(model, example(batch, n))
        counted += bool(weighted)
        for weight, value in weighted:
            gradients = torch.autograd.grad(
                value, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    totals[name] += weight * gradient**2
    return {name: total / counted for name, total in totals.items()}


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5
) -> None:
    """Each parameter to `relative` of its largest entry; gradients that are zero but for rounding
    are held to an absolute floor."""
    assert set(actual) == set(expected)
    floor = 1e-9 * max(float(value.max()) for value in expected.values())
    for name, wanted in expected.items():
        error = float((actual[name].double() - wanted).abs().max())
        bound = relative * float(wanted.max()) + floor
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
