"""The proof that the one-backward engine kept examples apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ewc.fisher.engine.one_backward import OneBackward
from hf_ewc.fisher.engine.one_by_one import OneByOne
from hf_ewc.fisher.engine.protocol import Objectives
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.parameters.sharding import whole_shape


@dataclass(frozen=True)
class Comparison:
    """What came of comparing the one-backward engine with single examples.

    Args:
        wrong: the parameters on which the two differ.
        proved: those on which they agree and which had a gradient at all.
    """

    wrong: list[str]
    proved: set[str]


def compare(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    pair: ExampleBatch,
    objectives: Objectives,
) -> Comparison:
    """The proof that examples were kept apart, on two of them.

    An axis of another meaning taken for the batch's would mix them.
    """
    if not pair.divisible:
        return Comparison(list(parameters), set())
    engine = OneBackward(model, parameters)
    engine.add(pair, objectives)
    residuals = engine.totals()
    sizes = {name: _sum(total) for name, total in residuals.items()}
    OneByOne(model, parameters, residuals, sign=-1.0).add(pair, objectives)
    errors = {name: _sum(residual.abs()) for name, residual in residuals.items()}
    return within_rounding(model, parameters, sizes, errors)


def within_rounding(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    sizes: Mapping[str, float],
    errors: Mapping[str, float],
) -> Comparison:
    """Tell from rounding what is not.

    Rounding explains a share of a parameter's own sum, and for gradients that are zero in exact
    arithmetic, such as those of attention's key biases, a share of the densest sum around them: in
    half precision of the same module, since the densest of the whole model would hide anything.

    Args:
        sizes: Σ of each parameter's sum of squares by the engine.
        errors: Σ of the absolute differences from single examples.
    """
    half = any(p.element_size() < 4 for p in parameters.values()) or _autocasts(model)
    relative, near, far = (0.3, 1e-3, 1e-6) if half else (1e-3, 0.0, 1e-9)
    numels = {name: max(math.prod(whole_shape(p)), 1) for name, p in parameters.items()}
    densities = {name: sizes[name] / numels[name] for name in parameters}
    densest = max(densities.values(), default=0.0)
    modules: dict[str, float] = {}
    for name, density in densities.items():
        module = name.rpartition(".")[0]
        modules[module] = max(density, modules.get(module, 0.0))
    wrong = [
        name
        for name, error in errors.items()
        if error
        > relative * sizes[name]
        + numels[name] * (near * modules[name.rpartition(".")[0]] + far * densest)
    ]
    seen = {name for name in parameters if sizes[name] > 0 or errors[name] > 0}
    return Comparison(wrong, seen - set(wrong))


def _autocasts(model: nn.Module) -> bool:
    wrapped_by_accelerate = hasattr(model, "_original_forward")
    return wrapped_by_accelerate or any(
        torch.is_autocast_enabled(device) for device in ("cpu", "cuda")
    )


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))
