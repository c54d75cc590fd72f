"""Convolutions of any dimension, stride, padding, dilation and number of groups.

∂/∂W of example n is the convolution's own weight gradient on that example alone. Patch embeddings,
where windows do not overlap, are linear maps of the unfolded patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.operations.linear import linear
from hf_ewc.fisher.operations.registry import (
    covers,
    detached,
    open_if_used,
    sum_rows_by_example,
    unviewed,
)
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.gradients import Dense, PerExampleGradient
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker


class _Convolution(torch.autograd.Function):
    """A convolution whose weight gradient is taken example by example."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        root: Tensor,
        tracker: Tracker,
        uses: tuple[Use | None, Use | None],
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.tracker, ctx.uses, ctx.settings = tracker, uses, settings
        ctx.owners = tracker.gathered_owners(x)
        ctx.save_for_backward(x, weight)
        return unviewed(torch.convolution(x, weight, bias, *settings))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        x, weight = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        if weight_use is not None:
            pairs = _by_example(ctx.owners, ctx.tracker.num_examples, gradient, x)
            weight_use.deliver(Convolution(pairs, weight, ctx.settings))
        if bias_use is not None:
            rows = gradient.flatten(2).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
            bias_use.deliver(Dense(sum_rows_by_example(ctx.tracker, rows, ctx.owners)))
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = _gradients(gradient, x, weight, ctx.settings, of_weight=False)
        return of_input, None, None, None, None, None, None


def _by_example(
    owners: Tensor | None, num_examples: int, gradient: Tensor, x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(g, x) of each example."""
    if owners is None:
        return list(zip(gradient.chunk(num_examples), x.chunk(num_examples), strict=True))
    return [(gradient[owners == n], x[owners == n]) for n in range(num_examples)]


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...], *, of_weight: bool
) -> Tensor:
    """The convolution's own backward: its gradient in the weight, or in the input."""
    wanted = [not of_weight, of_weight, False]
    gradients = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, wanted)
    chosen: Tensor = gradients[1 if of_weight else 0]
    return chosen


@dataclass(frozen=True)
class Convolution(PerExampleGradient):
    """G_n, the weight gradient of example n: `examples` holds its (g, x)."""

    examples: list[tuple[Tensor, Tensor]]
    weight: Tensor
    settings: tuple[Any, ...]

    def add_to(self, gradient: Tensor, example: int) -> None:
        g, x = self.examples[example]
        if len(x):
            gradient.add_(_gradients(g, x, self.weight, self.settings, of_weight=True))


@covers("conv1d", "conv2d", "conv3d")
def _handle_convolution(tracker: Tracker, call: Call) -> Any:
    x, weight, bias = _operands(tracker, call)
    axes = weight.dim() - 2
    stride = _per_axis(call.argument(3, "stride", 1), axes)
    padding = call.argument(4, "padding", 0)
    dilation = _per_axis(call.argument(5, "dilation", 1), axes)
    groups = call.argument(6, "groups", 1)
    if isinstance(padding, str):
        padding = _named_padding(padding, weight.shape[2:], dilation)
        if call.argument(4, "padding") == "same":
            x = _padded_behind(tracker, x, weight, dilation)
    padding = _per_axis(padding, axes)
    side_by_side = stride == list(weight.shape[2:]) and not any(padding)
    if side_by_side and groups == 1 and all(step == 1 for step in dilation):
        return _patch_embedding(tracker, x, weight, bias)
    settings = stride, padding, dilation, False, [0] * axes, groups
    return _convolve(tracker, x, weight, bias, settings)


@covers("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _handle_transposed(tracker: Tracker, call: Call) -> Any:
    x, weight, bias = _operands(tracker, call)
    axes = weight.dim() - 2
    stride, padding, output_padding = (
        _per_axis(call.argument(i, name, default), axes)
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    groups = call.argument(6, "groups", 1)
    dilation = _per_axis(call.argument(7, "dilation", 1), axes)
    settings = stride, padding, dilation, True, output_padding, groups
    return _convolve(tracker, x, weight, bias, settings)


def _operands(tracker: Tracker, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, bias = (call.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
    shared = tracker.is_shared(weight) and (bias is None or tracker.is_shared(bias))
    if not shared or tracker.is_shared(x) or x.dim() != weight.dim():
        raise Uncovered
    tracker.owners(x)
    if x.dtype != weight.dtype:
        raise Uncovered
    return x, weight, bias


def _convolve(
    tracker: Tracker,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    uses = open_if_used(tracker, weight), open_if_used(tracker, bias)
    output: Tensor = _Convolution.apply(
        x, weight.detach(), detached(bias), tracker.root, tracker, uses, settings
    )
    return output


def _patch_embedding(tracker: Tracker, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Windows side by side: y = W · patch for each, the patches being a reshape of x."""
    kernel = list(weight.shape[2:])
    counts = [size // k for size, k in zip(x.shape[2:], kernel, strict=True)]
    for axis, (count, k) in enumerate(zip(counts, kernel, strict=True), start=2):
        x = x.narrow(axis, 0, count * k)
    split = [size for pair in zip(counts, kernel, strict=True) for size in pair]
    axes = len(kernel)
    places = [2 + 2 * axis for axis in range(axes)]
    inside = [3 + 2 * axis for axis in range(axes)]
    patches = x.reshape(*x.shape[:2], *split).permute(0, *places, 1, *inside)
    patches = tracker.follow(patches.reshape(x.shape[0], -1, weight[0].numel()), x)
    output = linear(tracker, patches, weight.flatten(1), bias)
    return output.transpose(1, 2).reshape(x.shape[0], weight.shape[0], *counts)


def _per_axis(value: Any, axes: int) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * axes if len(values) == 1 else values


def _padded_behind(tracker: Tracker, x: Tensor, weight: Tensor, dilation: list[int]) -> Tensor:
    """With one place more behind along each axis where "same" pads unevenly."""
    odd = [d * (k - 1) % 2 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    if not any(odd):
        return x
    behind = [place for more in reversed(odd) for place in (0, more)]
    return tracker.follow(F.pad(x, behind), x)


def _named_padding(name: str, kernel: torch.Size, dilation: list[int]) -> list[int]:
    if name == "valid":
        return [0] * len(kernel)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [total // 2 for total in totals]
