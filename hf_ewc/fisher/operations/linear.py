"""Linear maps: y = x Wᵀ + b in all its spellings.

With inputs xₙ (T×I) and output gradients gₙ (T×O) of example n, ∂/∂W = gₙᵀ xₙ and
∂/∂b = Σ_t g_nt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.operations.elementwise import batched
from hf_ewc.fisher.operations.registry import (
    argument,
    covers,
    detached,
    open_if_used,
    sum_rows_by_example,
    unviewed,
)
from hf_ewc.fisher.uses.account import Site
from hf_ewc.fisher.uses.parts import DensePart, LinearPart, RaggedPart
from hf_ewc.fisher.uses.rows import Uncovered
from hf_ewc.fisher.uses.tracking import Interception


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; the backward returns ∂/∂x and delivers the parts of W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        root: Tensor,
        context: Interception,
        sites: tuple[Site | None, Site | None],
        owners: Tensor | None,
    ) -> Tensor:
        ctx.context, ctx.sites, ctx.owners = context, sites, owners
        ctx.save_for_backward(x, weight)
        return unviewed(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        x, weight = ctx.saved_tensors
        weight_site, bias_site = ctx.sites
        context, owners = ctx.context, ctx.owners
        if bias_site is not None:
            bias_site.deliver(DensePart(sum_rows_by_example(context, gradient, owners)))
        if weight_site is not None and owners is not None:
            rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            weight_site.deliver(RaggedPart(*rows, owners, context.num_examples))
        elif weight_site is not None:
            part = LinearPart(context.per_example(gradient), context.per_example(x))
            weight_site.deliver(part)
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_input, None, None, None, None, None, None


def linear(context: Interception, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias) with the uses of weight and bias opened in the ledger."""
    if x.dim() < 2 or weight.dim() != 2 or context.is_shared(x):
        raise Uncovered
    owners = context.gathered_owners(x)
    if owners is None:
        context.rows_per_example(x)
    elif x.dim() > 2:
        owners = owners.repeat_interleave(math.prod(x.shape[1:-1]))
    sites = open_if_used(context, weight), open_if_used(context, bias)
    x, weight, bias = _autocast(x, weight, bias)
    output: Tensor = _Linear.apply(
        x, weight.detach(), detached(bias), context.root, context, sites, owners
    )
    return output


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
def _handle_linear(
    context: Interception,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    x = argument(args, kwargs, 0, "input")
    weight, bias = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    _require_shared(context, weight, bias)
    return linear(context, x, weight, bias)


@covers("addmm")
def _handle_addmm(
    context: Interception,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """b + x W, the spelling of GPT-2's Conv1D: a linear map with the transposed weight."""
    bias, x, weight = (
        argument(args, kwargs, i, n) for i, n in enumerate(("input", "mat1", "mat2"))
    )
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or bias.dim() != 1:
        raise Uncovered
    _require_shared(context, weight, bias)
    return linear(context, x, weight.t(), bias)


@covers("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
def _handle_matmul(
    context: Interception,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    left = argument(args, kwargs, 0, "input")
    right = argument(args, kwargs, 1, "mat2" if "mat2" in kwargs else "other")
    if func is torch.Tensor.__rmatmul__:
        left, right = right, left
    if context.is_shared(right):
        return times_weight(context, left, right)
    if left.dim() >= 2 and right.dim() >= 3:  # W x = (xᵀ Wᵀ)ᵀ
        x = context.follow(right.transpose(-1, -2), right)
        return times_weight(context, x, left.transpose(-1, -2)).transpose(-1, -2)
    raise Uncovered


def times_weight(context: Interception, x: Tensor, weight: Tensor) -> Tensor:
    """x @ W for W (I,), (I, O) or, paired with an axis of x, (…, I, O)."""
    if weight.dim() == 1:
        return linear(context, x, weight.unsqueeze(0), None).squeeze(-1)
    if weight.dim() == 2:
        return linear(context, x, weight.t(), None)
    axis = x.dim() - weight.dim()
    if axis not in (0, 1):
        raise Uncovered
    if not context.is_direct(weight) or weight.shape[0] != x.shape[axis]:
        return x @ batched(context, weight, x)
    slices = [_slicetimes_weight(context, x, weight, axis, i) for i in range(weight.shape[0])]
    return torch.stack(slices, dim=axis)


def _slicetimes_weight(
    context: Interception, x: Tensor, weight: Tensor, axis: int, index: int
) -> Tensor:
    part = x.select(axis, index)
    part = context.follow(part, x if axis else part)
    return times_weight(context, part, weight[index])


def _require_shared(context: Interception, *operands: Tensor | None) -> None:
    if not all(operand is None or context.is_shared(operand) for operand in operands):
        raise Uncovered
