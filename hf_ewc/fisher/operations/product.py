"""Matrix products with a parameter on either side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.operations.contraction import contract
from hf_ewc.fisher.operations.elementwise import add
from hf_ewc.fisher.operations.linear import times_weight
from hf_ewc.fisher.operations.registry import covers
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.owners import varying
from hf_ewc.fisher.uses.tracking import Tracker


@covers("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
def _handle_matmul(tracker: Tracker, call: Call) -> Any:
    left = call.argument(0, "input")
    right = call.argument(1, "mat2" if "mat2" in call.kwargs else "other")
    if call.func is torch.Tensor.__rmatmul__:
        left, right = right, left
    if tracker.is_shared(right):
        return _product(tracker, left, right)
    if left.dim() >= 2 and right.dim() >= 3:  # W x = (xᵀ Wᵀ)ᵀ
        x = tracker.run(torch.transpose, right, -1, -2)
        return _product(tracker, x, left.transpose(-1, -2)).transpose(-1, -2)
    raise Uncovered


@covers("baddbmm")
def _handle_baddbmm(tracker: Tracker, call: Call) -> Any:
    """β b + α x y, of which any may be a parameter."""
    added, left, right = (
        call.argument(i, name) for i, name in enumerate(("input", "batch1", "batch2"))
    )
    product = Call(torch.bmm, "bmm", (left, right), {})
    used = tracker.is_used(left) or tracker.is_used(right)
    result = _handle_matmul(tracker, product) if used else product.run()
    tracker.follow_call(product, [left, right], [result])
    result = tracker.follow(result * call.kwargs.get("alpha", 1), result)
    scaled = added * call.kwargs.get("beta", 1)
    return add(tracker, result, tracker.share(scaled) if tracker.is_used(added) else scaled)


def _product(tracker: Tracker, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight; where examples do not lie along the first axis, as a contraction."""
    owners = None if weight.dim() < 3 else tracker.element_owners(x)
    if owners is None or varying(owners) in ([], [0]):
        return times_weight(tracker, x, weight)
    axes, paired = "abcdefgh"[: x.dim() - 2], weight.dim() - 2
    if paired > len(axes) or weight.shape[:-2] != x.shape[len(axes) - paired : -2]:
        raise Uncovered
    pairs = axes[len(axes) - paired :]
    return contract(tracker, x, axes + "ik", weight, pairs + "kj", axes + "ij")
