"""Parameters used as they are: position embeddings, class tokens, scales, bias tables.

Broadcasting over the batch sums the gradient over examples; so the parameter is first expanded to
p_n = p, one copy (a view) per example, and the gradient of p_n is the example's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.operations.registry import covers
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.gradients import Dense, Lookup, Rows
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.tracking import Tracker


class _Expand(torch.autograd.Function):
    """p → (B, *p.shape); the backward delivers one gradient per example.

    Where p = W[indices] was looked up with indices common to all examples, the gradient is W's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        root: Tensor,
        num_examples: int,
        use: Use | None,
        indices: Tensor | None,
    ) -> Tensor:
        ctx.use, ctx.indices = use, indices
        return value.unsqueeze(0).expand(num_examples, *value.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, ...]:
        (gradient,) = outputs
        if ctx.use is not None and ctx.indices is None:
            ctx.use.deliver(Dense(gradient))
        elif ctx.use is not None:
            count = gradient.shape[0]
            owners = torch.arange(count, device=gradient.device)
            owners = owners.repeat_interleave(ctx.indices.numel())
            rows = gradient.reshape(-1, gradient.shape[-1])
            ctx.use.deliver(Lookup(ctx.indices.flatten().repeat(count), rows, owners))
        return None, None, None, None, None


class _Rows(torch.autograd.Function):
    """A tensor from parameters whose rows already belong to examples: p (R, …)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, root: Tensor, owners: Tensor, use: Use | None) -> Tensor:
        ctx.use, ctx.owners = use, owners
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, ...]:
        (gradient,) = outputs
        if ctx.use is not None:
            ctx.use.deliver(Rows(gradient, ctx.owners))
        return None, None, None, None


def batched(tracker: Tracker, used: Tensor, reference: Tensor, rank: int | None = None) -> Tensor:
    """`used` with an axis of examples, so that it broadcasts against `reference` (R, …).

    The result has `rank` axes, by default those of `reference`.
    """
    rank = reference.dim() if rank is None else rank
    if tracker.gathered_owners(reference) is None:
        tracker.rows_per_example(reference)
    if used.dim() == rank and used.shape[0] == reference.shape[0]:
        if used.stride(0) != 0:
            return _row_by_row(tracker, used, reference)
        used = used.narrow(0, 0, 1)
    if used.dim() == rank:
        if used.shape[0] != 1:
            raise Uncovered
        expanded = _expand(tracker, used).squeeze(1)
    elif used.dim() < rank:
        ones = [1] * (rank - 1 - used.dim())
        expanded = _expand(tracker, used)
        expanded = expanded.reshape(tracker.num_examples, *ones, *used.shape)
    else:
        raise Uncovered
    if reference.shape[0] == tracker.num_examples and tracker.gathered_owners(reference) is None:
        return expanded
    return expanded.index_select(0, tracker.owners(reference))


def _expand(tracker: Tracker, used: Tensor) -> Tensor:
    looked_up = tracker.lookups.get(used)
    weight, indices = looked_up if looked_up is not None else (used, None)
    use = tracker.open(weight)
    output: Tensor = _Expand.apply(used.detach(), tracker.root, tracker.num_examples, use, indices)
    return output


def _row_by_row(tracker: Tracker, used: Tensor, reference: Tensor) -> Tensor:
    use = tracker.open(used)
    output: Tensor = _Rows.apply(used.detach(), tracker.root, tracker.owners(reference), use)
    return output


def _reference(tracker: Tracker, operands: Sequence[Any]) -> Tensor:
    """The operand that carries examples along the first axis of the result."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    rank = max(tensor.dim() for tensor in tensors)
    carriers = [t for t in tensors if not tracker.is_shared(t) and t.dim() == rank and rank > 0]
    if not carriers:
        raise Uncovered
    return max(carriers, key=lambda tensor: tensor.shape[0])


_BINARY = "add sub mul div true_divide pow maximum minimum"
_REFLECTED = "__radd__ __rsub__ __rmul__ __rtruediv__ __rdiv__ __rpow__ __pow__ rsub"
_OPERATORS = "__add__ __sub__ __mul__ __truediv__ __div__"
_IN_PLACE = "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__"
_TERNARY = "where addcmul lerp"


@covers(*" ".join((_BINARY, _REFLECTED, _OPERATORS, _IN_PLACE, _TERNARY)).split())
def _handle_elementwise(tracker: Tracker, call: Call) -> Any:
    in_place = call.name in _IN_PLACE.split()
    if in_place and tracker.is_shared(call.args[0]):
        raise Uncovered
    reference = _reference(tracker, [*call.args, *call.kwargs.values()])

    def prepare(value: Any) -> Any:
        return batched(tracker, value, reference) if tracker.is_used(value) else value

    options = {name: prepare(value) for name, value in call.kwargs.items()}
    return call.func(*map(prepare, call.args), **options)


@covers("cat", "concat", "concatenate", "stack")
def _handle_concatenation(tracker: Tracker, call: Call) -> Any:
    tensors = list(call.argument(0, "tensors"))
    axis = call.argument(1, "dim", 0)
    reference = _reference(tracker, tensors)
    if axis % (reference.dim() + (call.name == "stack")) == 0:
        raise Uncovered
    if any(tensor.shape[0] != reference.shape[0] for tensor in tensors):
        raise Uncovered
    prepared = [
        batched(tracker, tensor, reference) if tracker.is_used(tensor) else tensor
        for tensor in tensors
    ]
    widest = [tensor.expand(reference.shape[0], *tensor.shape[1:]) for tensor in prepared]
    return call.func(widest, dim=axis)


@covers("scaled_dot_product_attention")
def _handle_attention(tracker: Tracker, call: Call) -> Any:
    """Learnt queries (poolers, perceivers), and a learnt bias on the scores (T5, Swin) as mask."""
    names = ("query", "key", "value", "attn_mask")
    operands = [call.argument(i, name) for i, name in enumerate(names)]
    carriers = [tensor for tensor in operands[:3] if not tracker.is_shared(tensor)]
    if not carriers:
        raise Uncovered
    prepared = [
        batched(tracker, operand, carriers[0]) if tracker.is_used(operand) else operand
        for operand in operands
    ]
    options = {name: value for name, value in call.kwargs.items() if name not in names}
    return call.func(*prepared, *call.args[4:], **options)


def multiply(tracker: Tracker, x: Tensor, scale: Any) -> Tensor:
    """x · scale, where scale may be a parameter."""
    return x * (batched(tracker, scale, x) if _is_parameter(scale) else scale)


def add(tracker: Tracker, x: Tensor, shift: Any) -> Tensor:
    """x + shift, where shift may be a parameter."""
    return x + (batched(tracker, shift, x) if _is_parameter(shift) else shift)


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
