"""Look-ups of rows: embeddings and indexing with indices from the batch.

With indices i_nt and output gradients g_nt, ∂/∂W[v] of example n = Σ_t [i_nt = v] g_nt.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.operations.registry import covers, unviewed
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.gradients import Lookup
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker


class _Lookup(torch.autograd.Function):
    """y = W[indices]; the padding row takes no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weight: Tensor,
        root: Tensor,
        use: Use | None,
        owners: Tensor,
        padding: int | None,
    ) -> Tensor:
        ctx.use, ctx.owners, ctx.padding = use, owners, padding
        ctx.save_for_backward(indices)
        return unviewed(F.embedding(indices, weight))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, ...]:
        (gradient,) = outputs
        (indices,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((indices == ctx.padding).unsqueeze(-1), 0.0)
        if ctx.use is None:
            return (None,) * 6
        rows = gradient.reshape(-1, gradient.shape[-1])
        ctx.use.deliver(Lookup(indices.flatten(), rows, ctx.owners))
        return (None,) * 6


def look_up(
    tracker: Tracker, indices: Tensor, weight: Tensor, padding: int | None = None
) -> Tensor:
    """weight[indices] for a weight (V, D) and integer indices that carry examples."""
    if weight.dim() != 2 or indices.dim() == 0 or indices.is_floating_point():
        raise Uncovered
    owners = tracker.all_owners(indices).expand(indices.shape).flatten()
    use = tracker.open(weight)
    output: Tensor = _Lookup.apply(indices, weight.detach(), tracker.root, use, owners, padding)
    return output


@covers("embedding")
def _handle_embedding(tracker: Tracker, call: Call) -> Any:
    if call.func is not F.embedding:
        raise Uncovered
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    options = {name: call.argument(i, name) for i, name in enumerate(names, start=2)}
    if options["max_norm"] is not None or options["scale_grad_by_freq"]:
        raise Uncovered
    indices, weight = call.argument(0, "input"), call.argument(1, "weight")
    padding = options["padding_idx"]
    if padding is not None and padding < 0:
        padding += weight.shape[0]
    return look_up(tracker, indices, weight, padding)


@covers("__getitem__", "index_select")
def _handle_indexing(tracker: Tracker, call: Call) -> Any:
    weight, indices = call.args[0], call.args[-1]
    if call.name == "index_select" and call.args[1] != 0:
        raise Uncovered
    if not tracker.is_used(weight) or not isinstance(indices, Tensor):
        raise Uncovered
    if indices.dtype == torch.bool or indices.is_floating_point():
        raise Uncovered
    if indices.dim() == 0:  # one row, chosen by the data: a view, as if chosen by a number
        return tracker.share(weight[int(indices)])
    rows = weight.reshape(weight.shape[0], -1)
    wrapped = tracker.follow(indices % weight.shape[0], indices)
    picked = look_up(tracker, wrapped, rows)
    return picked.reshape(*indices.shape, *weight.shape[1:])
