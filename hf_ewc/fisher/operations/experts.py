"""Mixtures of experts: rows sorted by expert, each block multiplied by its expert's weight.

For the rows R_ne that example n sends to expert e, ∂/∂W_e of example n = Σ_{r ∈ R_ne} x_r g_rᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.operations.registry import covers
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.gradients import RaggedLinear
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker


class _GroupedProduct(torch.autograd.Function):
    """y_r = x_r W_e for the rows r of each expert e, given by the offsets where blocks end."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        root: Tensor,
        owners: Tensor,
        num_examples: int,
        bounds: list[tuple[int, int]],
        uses: list[Use | None],
    ) -> Tensor:
        ctx.owners, ctx.num_examples, ctx.bounds, ctx.uses = owners, num_examples, bounds, uses
        ctx.save_for_backward(x, weight)
        output = x.new_zeros(x.shape[0], weight.shape[-1])
        for expert, (start, stop) in enumerate(bounds):
            if start < stop:
                torch.mm(x[start:stop], weight[expert], out=output[start:stop])
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        x, weight = ctx.saved_tensors
        of_input = torch.zeros_like(x)
        for expert, (start, stop) in enumerate(ctx.bounds):
            if start == stop:
                continue
            g, rows = gradient[start:stop], x[start:stop]
            torch.mm(g, weight[expert].T, out=of_input[start:stop])
            use, owners = ctx.uses[expert], ctx.owners[start:stop]
            if use is not None:
                use.deliver(RaggedLinear(g, rows, owners, ctx.num_examples))
        return of_input, None, None, None, None, None, None


@covers("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
def _handle_grouped(tracker: Tracker, call: Call) -> Any:
    x, weight, offsets = call.args[0], call.args[1], call.argument(2, "offs")
    if x.dim() != 2 or weight.dim() != 3 or offsets is None or not tracker.is_shared(weight):
        raise Uncovered
    stops = offsets.tolist()
    bounds = list(zip([0, *stops[:-1]], stops, strict=True))
    uses = [
        tracker.open(weight[expert].t()) if start < stop else None
        for expert, (start, stop) in enumerate(bounds)
    ]
    owners = tracker.owners(x)
    arguments = tracker.root, owners, tracker.num_examples, bounds, uses
    return _GroupedProduct.apply(x, weight.detach(), *arguments)
