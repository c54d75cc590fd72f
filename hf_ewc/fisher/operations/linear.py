"""Linear maps: y = x Wᵀ + b in all its spellings.

With inputs xₙ (T×I) and output gradients gₙ (T×O) of example n, ∂/∂W = gₙᵀ xₙ and
∂/∂b = Σ_t g_nt.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.operations.elementwise import batched
from hf_ewc.fisher.operations.registry import (
    covers,
    detached,
    open_if_used,
    sum_rows_by_example,
    unviewed,
)
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.gradients import Dense, Linear, RaggedLinear
from hf_ewc.fisher.uses.owners import varying
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; the backward returns ∂/∂x and delivers the gradients of W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        root: Tensor,
        tracker: Tracker,
        uses: tuple[Use | None, Use | None],
        owners: Tensor | None,
        axis: int,
    ) -> Tensor:
        ctx.tracker, ctx.uses, ctx.owners, ctx.axis = tracker, uses, owners, axis
        ctx.save_for_backward(x, weight)
        return unviewed(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        x, weight = ctx.saved_tensors
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        x, gradient = x.movedim(ctx.axis, 0), gradient.movedim(ctx.axis, 0)
        weight_use, bias_use = ctx.uses
        tracker, owners = ctx.tracker, ctx.owners
        if bias_use is not None:
            bias_use.deliver(Dense(sum_rows_by_example(tracker, gradient, owners)))
        if weight_use is not None and owners is not None:
            rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            weight_use.deliver(RaggedLinear(*rows, owners, tracker.num_examples))
        elif weight_use is not None:
            products = Linear(tracker.per_example(gradient), tracker.per_example(x))
            weight_use.deliver(products)
        return of_input, None, None, None, None, None, None, None


def linear(tracker: Tracker, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias) with the uses of weight and bias opened in the ledger."""
    if weight.dim() != 2 or tracker.is_shared(x):
        raise Uncovered
    owners, axis = _owners_of_vectors(tracker, x)
    uses = open_if_used(tracker, weight), open_if_used(tracker, bias)
    x, weight, bias = _autocast(x, weight, bias)
    output: Tensor = _Linear.apply(
        x, weight.detach(), detached(bias), tracker.root, tracker, uses, owners, axis
    )
    return output


def _owners_of_vectors(tracker: Tracker, x: Tensor) -> tuple[Tensor | None, int]:
    """The example of each vector along the last axis of x, and along which axis examples lie.

    The owners are None where they are in order along that axis.
    """
    owners = tracker.element_owners(x)
    axes = [] if owners is None else varying(owners)
    if x.dim() - 1 in axes or (owners is None and x.dim() < 2):
        raise Uncovered
    if owners is None:
        tracker.rows_per_example(x)
        return None, 0
    if len(axes) == 1:
        front, axis = tracker.examples_first(x)  # time first, or packed into one row
        if tracker.element_owners(front) is None:
            return None, axis
    return owners.squeeze(-1).expand(x.shape[:-1]).flatten(), 0


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts that autocast makes in a linear map, made where the graph records them."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast_bias = None if bias is None else bias.to(dtype)
    return x.to(dtype), weight.to(dtype), cast_bias


@covers("linear")
def _handle_linear(tracker: Tracker, call: Call) -> Any:
    x = call.argument(0, "input")
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    _require_shared(tracker, weight, bias)
    return linear(tracker, x, weight, bias)


@covers("addmm")
def _handle_addmm(tracker: Tracker, call: Call) -> Any:
    """b + x W, the spelling of GPT-2's Conv1D: a linear map with the transposed weight."""
    bias, x, weight = (call.argument(i, n) for i, n in enumerate(("input", "mat1", "mat2")))
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1 or bias.dim() != 1:
        raise Uncovered
    _require_shared(tracker, weight, bias)
    return linear(tracker, x, weight.t(), bias)


def times_weight(tracker: Tracker, x: Tensor, weight: Tensor) -> Tensor:
    """x @ W for W (I,), (I, O) or, paired with an axis of x, (…, I, O)."""
    if weight.dim() == 1:
        return linear(tracker, x, weight.unsqueeze(0), None).squeeze(-1)
    if weight.dim() == 2:
        return linear(tracker, x, weight.t(), None)
    axis = x.dim() - weight.dim()
    if axis not in (0, 1):
        raise Uncovered
    if not tracker.is_direct(weight) or weight.shape[0] != x.shape[axis]:
        if tracker.element_owners(x) is not None:
            tracker.gathered_owners(x)  # of whole matrices, not of their rows
        return x @ batched(tracker, weight, x)
    slices = [_slice_times_weight(tracker, x, weight, axis, i) for i in range(weight.shape[0])]
    return torch.stack(slices, dim=axis)


def _slice_times_weight(
    tracker: Tracker, x: Tensor, weight: Tensor, axis: int, index: int
) -> Tensor:
    return times_weight(tracker, tracker.run(torch.select, x, axis, index), weight[index])


def _require_shared(tracker: Tracker, *operands: Tensor | None) -> None:
    if not all(operand is None or tracker.is_shared(operand) for operand in operands):
        raise Uncovered
