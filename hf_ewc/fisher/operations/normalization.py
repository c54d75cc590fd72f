"""Normalizations: y = x̂ · w + b, where x̂ depends on no parameter.

∂/∂w of example n = Σ_t g_nt x̂_nt and ∂/∂b = Σ_t g_nt. Layer norm keeps its fused kernels; the
others are normalized without affine parameters, which are then applied element by element.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.operations.elementwise import add, multiply
from hf_ewc.fisher.operations.registry import covers, detached, open_if_used
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.gradients import Dense
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker

_backward = torch.ops.aten.native_layer_norm_backward
# The fused kernel runs for each example, in one sweep, where an example has so many elements; a
# call costs what four sweeps over fewer do.
_LONG_EXAMPLE = 1 << 15


class _LayerNorm(torch.autograd.Function):
    """The fused layer norm over the last axes, for x (B·k, …)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        root: Tensor,
        tracker: Tracker,
        uses: tuple[Use | None, Use | None],
    ) -> Tensor:
        output, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.tracker, ctx.uses = shape, tracker, uses
        ctx.save_for_backward(x, mean, scale, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        saved = ctx.saved_tensors  # once: a checkpoint has them unpacked one time
        x, mean, scale, weight, bias = saved
        if any(ctx.uses):
            sums = _sums_of_examples(ctx.tracker, ctx.shape, gradient, *saved)
            for use, of_examples in zip(ctx.uses, sums, strict=True):
                if use is not None:
                    use.deliver(Dense(of_examples))
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input, _, _ = _backward(
                gradient, x, ctx.shape, mean, scale, weight, bias, [True, False, False]
            )
        return of_input, None, None, None, None, None, None, None


def _sums_of_examples(
    tracker: Tracker,
    shape: list[int],
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Σ_t g_nt x̂_nt and Σ_t g_nt of each example n, (B, *shape)."""

    def by_example(tensor: Tensor) -> Tensor:
        return tensor.reshape(tracker.num_examples, -1, *tensor.shape[-len(shape) :])

    gradient, x, mean, scale = map(by_example, (gradient, x, mean, scale))
    if weight is None or x.device.type != "cpu" or x[0].numel() < _LONG_EXAMPLE:
        return (x - mean).mul_(scale).mul_(gradient).sum(1), gradient.sum(1)
    affine = weight, weight if bias is None else bias  # of the bias its shape alone matters
    found = [
        _backward(gradient[n], x[n], shape, mean[n], scale[n], *affine, [False, True, True])
        for n in range(tracker.num_examples)
    ]
    return torch.stack([one[1] for one in found]), torch.stack([one[2] for one in found])


@covers("layer_norm")
def _handle_layer_norm(tracker: Tracker, call: Call) -> Any:
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    eps = call.argument(4, "eps", 1e-5)
    if call.func is not F.layer_norm:
        raise Uncovered
    plain = tracker.element_owners(x) is None and x.dim() > len(shape)
    if plain and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        tracker.rows_per_example(x)
        uses = open_if_used(tracker, weight), open_if_used(tracker, bias)
        arguments = x, list(shape), detached(weight), detached(bias), eps
        return _LayerNorm.apply(*arguments, tracker.root, tracker, uses)
    normalized = F.layer_norm(x, shape, None, None, eps)
    return _affine(tracker, normalized, weight, bias, like=x)


@covers("rms_norm")
def _handle_rms_norm(tracker: Tracker, call: Call) -> Any:
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    weight, eps = call.argument(2, "weight"), call.argument(3, "eps")
    return _affine(tracker, F.rms_norm(x, shape, None, eps), weight, None, like=x)


@covers("group_norm")
def _handle_group_norm(tracker: Tracker, call: Call) -> Any:
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    eps = call.argument(4, "eps", 1e-5)
    normalized = F.group_norm(x, groups, None, None, eps)
    return _affine(tracker, normalized, _per_channel(weight, x), _per_channel(bias, x), like=x)


@covers("batch_norm")
def _handle_batch_norm(tracker: Tracker, call: Call) -> Any:
    """Batch norm with its running statistics; with the batch's own, examples are coupled."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    x, mean, variance, weight, bias, training = (
        call.argument(i, name) for i, name in enumerate(names)
    )
    if training or call.func is not F.batch_norm or mean is None:
        raise Uncovered
    eps = call.argument(7, "eps", 1e-5)
    normalized = F.batch_norm(x, mean, variance, None, None, False, 0.0, eps)
    return _affine(tracker, normalized, _per_channel(weight, x), _per_channel(bias, x), like=x)


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(-1, *[1] * (x.dim() - 2))


def _affine(tracker: Tracker, x: Tensor, weight: Any, bias: Any, *, like: Tensor) -> Tensor:
    tracker.follow(x, like)
    if weight is not None:
        x = tracker.follow(multiply(tracker, x, weight), like)
    return x if bias is None else add(tracker, x, bias)
