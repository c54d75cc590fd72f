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
from hf_ewc.fisher.uses.owners import constant_along, varying
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
    owners = tracker.element_owners(reference)
    if owners is None:
        tracker.rows_per_example(reference)
    elif varying(owners) != [0] and rank == reference.dim():
        return _spread(tracker, used, owners)
    if used.dim() == rank and used.shape[0] == reference.shape[0]:
        if used.stride(0) != 0:
            return _own_rows(tracker, used, tracker.owners(reference))
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


def _spread(tracker: Tracker, used: Tensor, owners: Tensor) -> Tensor:
    """`used` with an example of its own wherever the owners of a tensor of as many axes vary."""
    used = used.reshape(*[1] * (owners.dim() - used.dim()), *used.shape)
    axes = varying(owners)
    if used.dim() != owners.dim():
        raise Uncovered
    for axis in axes:
        if used.shape[axis] != 1 and used.stride(axis) == 0:
            used = used.narrow(axis, 0, 1)
    if len(axes) == 1 and used.shape[axes[0]] == owners.numel():
        front = tracker.share(used.movedim(axes[0], 0))
        return _own_rows(tracker, front, owners.flatten()).movedim(0, axes[0])
    if any(used.shape[axis] != 1 for axis in axes):
        raise Uncovered
    rows = _expand(tracker, used)[owners.squeeze()]
    # The axes of the owners come first: each goes where the parameter has one of size 1.
    rest = [axis for axis in range(owners.dim()) if axis not in axes]
    rows = rows.reshape(
        *[owners.shape[axis] for axis in axes], *[used.shape[axis] for axis in rest]
    )
    order = [*axes, *rest]
    return rows.permute([order.index(axis) for axis in range(owners.dim())])


def _expand(tracker: Tracker, used: Tensor) -> Tensor:
    looked_up = tracker.lookups.get(used)
    weight, indices = looked_up if looked_up is not None else (used, None)
    use = tracker.open(weight)
    output: Tensor = _Expand.apply(used.detach(), tracker.root, tracker.num_examples, use, indices)
    return output


def _own_rows(tracker: Tracker, used: Tensor, owners: Tensor) -> Tensor:
    use = tracker.open(used)
    output: Tensor = _Rows.apply(used.detach(), tracker.root, owners, use)
    return output


def _reference(tracker: Tracker, operands: Sequence[Any]) -> Tensor:
    """The operand that carries examples along the first axis of the result."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    rank = max(tensor.dim() for tensor in tensors)
    carriers = [t for t in tensors if not tracker.is_shared(t) and t.dim() == rank and rank > 0]
    if not carriers:
        raise Uncovered
    return max(carriers, key=lambda tensor: tensor.numel())


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
    owners = tracker.all_owners(reference)
    if call.name != "stack":
        constant_along(owners, [axis])
    own = varying(owners)
    if any(tensor.shape[i] != reference.shape[i] for tensor in tensors for i in own):
        raise Uncovered
    prepared = [
        batched(tracker, tensor, reference) if tracker.is_used(tensor) else tensor
        for tensor in tensors
    ]
    return call.func([_as_wide(tensor, reference, own) for tensor in prepared], dim=axis)


def _as_wide(tensor: Tensor, reference: Tensor, axes: list[int]) -> Tensor:
    return tensor.expand(
        [reference.shape[i] if i in axes else size for i, size in enumerate(tensor.shape)]
    )


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


@covers("__setitem__")
def _handle_writing(tracker: Tracker, call: Call) -> Any:
    """x[index] = p: what stands there belongs to whom it belonged before."""
    target, index, value = call.args
    if not tracker.is_used(value) or tracker.is_used(target):
        raise Uncovered
    place = tracker.run(torch.Tensor.__getitem__, target, index)
    return call.func(target, index, batched(tracker, value, place))


@covers("grid_sampler")
def _handle_grid_sampler(tracker: Tracker, call: Call) -> Any:
    """A learnt map (1, D, h, w), read at places (N, H, W, 2) of the examples."""
    learnt, grid, *settings = call.args
    if not tracker.is_used(learnt) or learnt.shape[0] != 1:
        raise Uncovered
    owners = tracker.element_owners(grid)
    if owners is None:
        return call.func(batched(tracker, learnt, grid), grid, *settings)
    if varying(owners) not in ([], [1]):
        raise Uncovered
    rows = owners.flatten().expand(grid.shape[1])
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=tracker.num_examples).tolist()
    maps, places = _expand(tracker, learnt), grid[:, order].split(counts, 1)
    read = [call.func(maps[n], own, *settings) for n, own in enumerate(places) if counts[n]]
    return torch.cat(read, 2)[:, :, order.argsort()]


def multiply(tracker: Tracker, x: Tensor, scale: Any) -> Tensor:
    """x · scale, where scale may be a parameter."""
    return x * (batched(tracker, scale, x) if tracker.is_used(scale) else scale)


def add(tracker: Tracker, x: Tensor, shift: Any) -> Tensor:
    """x + shift, where shift may be a parameter."""
    return x + (batched(tracker, shift, x) if tracker.is_used(shift) else shift)
