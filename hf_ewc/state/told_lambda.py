"""The λ that a state's importance tells, where nobody gives one."""

from __future__ import annotations

import torch

from hf_ewc.parameters.sharding import whole
from hf_ewc.state.packed import TensorMap

REACH = 0.4  # 1/δ, for a share ρ of 1: fitted to short sequences of images and texts
LARGEST = 1e4


def told_lambda(importance: TensorMap, num_tasks: int) -> float:
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
    roots, total, number = 0.0, 0.0, 0
    for name in importance:
        values = importance[name]
        roots += float(whole(values.sqrt().sum(dtype=torch.float64)))
        total += float(whole(values.sum(dtype=torch.float64)))
        number += int(whole((values > 0).sum()))
    if total == 0.0:
        return 1.0
    typical = roots / number / max(num_tasks, 1) ** 0.5
    share = roots**2 / (number * total)
    return float(f"{min(REACH / (typical * share**2), LARGEST):.3g}")
