"""The λ that a state's importance tells, where nobody gives one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_ewc.parameters.sharding import whole
from hf_ewc.precision import wide_sum
from hf_ewc.report.layers import layer_of

REACH = 0.4  # 1/δ, for a share ρ of 1: fitted to short sequences of images and texts
LARGEST = 1e4


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of the entries of an importance: Σ √A, Σ A, and how many are above 0."""

    roots: float
    total: float
    number: int


def told_lambda(importance: Mapping[str, Tensor], num_tasks: int) -> float:
    """λ = min(0.4 / (g ρ²), 1e4), for an importance A that K tasks have added up to.

    g = (1/n) Σ_i √(A_i / K),   ρ = (Σ_i √A_i)² / (n Σ_i A_i),   over the n entries with A_i > 0

    g is the typical size of a parameter's gradient on one old label, ρ the share of the parameters
    that A is spread over (1 where all are alike, k/n where k are alike and the rest next to
    nothing). At a distance δ the penalty pulls with λ A δ; that this is about g asks for λ ~ 1/g,
    as steps of Adam are of one size whatever the gradient's. Where A is concentrated, as where a
    model is sure of most of its old examples, the many parameters with little of it need more. As
    tasks pile up, A spreads over the model and λ falls. No constant of proportion follows from
    this; 0.4 and the square are fitted. 1 where A is 0; of tensors that are held sparse only what
    is kept counts. Sums are in fp64, and the result is rounded to three digits, which no order of
    summation changes.

    Under FSDP2 every process has to call it, and each gets the same.
    """
    return _told([_sums(importance[name]) for name in importance], num_tasks)


def told_layer_lambdas(importance: Mapping[str, Tensor], num_tasks: int) -> dict[str, float]:
    """For each parameter `told_lambda` of its layer, by that layer's importance alone.

    λ_l = min(0.4 / (g_l ρ_l²), 1e4), g_l and ρ_l over layer l (`layer_of`) alone

    Under FSDP2 every process has to call it, and each gets the same.
    """
    layers: dict[str, list[_Sums]] = {}
    for name in importance:
        layers.setdefault(layer_of(name), []).append(_sums(importance[name]))
    told = {layer: _told(parts, num_tasks) for layer, parts in layers.items()}
    return {name: told[layer_of(name)] for name in importance}


def _sums(values: Tensor) -> _Sums:
    return _Sums(
        float(whole(wide_sum(values.sqrt()))),
        float(whole(wide_sum(values))),
        int(whole((values > 0).sum())),
    )


def _told(parts: Iterable[_Sums], num_tasks: int) -> float:
    roots, total, number = 0.0, 0.0, 0
    for part in parts:
        roots, total, number = roots + part.roots, total + part.total, number + part.number
    if total == 0.0:
        return 1.0
    typical = roots / number / max(num_tasks, 1) ** 0.5
    share = roots**2 / (number * total)
    return float(f"{min(REACH / (typical * share**2), LARGEST):.3g}")
