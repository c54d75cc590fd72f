"""The owners of what is computed of several tensors, or summed over axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.owners import constant_along, leading, merged

Owners = Sequence[Tensor]
_Rule = Callable[[Call, Sequence[Tensor], Owners, Tensor], Tensor]
_MATMULS = frozenset({"matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "baddbmm", "addmm"})
_JOINING = frozenset({"cat", "concat", "concatenate", "stack"})
_NORMALIZING = frozenset({"softmax", "log_softmax", "cumsum", "cumprod", "softmin", "normalize"})
_REDUCING = frozenset(
    {"sum", "mean", "max", "min", "amax", "amin", "prod", "any", "all", "norm", "logsumexp"}
    | {"argmax", "argmin", "var", "std", "median", "nansum", "count_nonzero"}
)


def combined(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    """The owners of `output`; `Uncovered` where it mixes examples or that is not known.

    Args:
        tensors: the arguments that carry examples; `owners` are theirs.
    """
    rule = _RULES.get(call.name)
    if rule is not None:
        return rule(call, tensors, owners, output)
    if _broadcasts(tensors, output):
        return merged(owners, output.shape)
    found = [leading(own, x, output.shape) for own, x in zip(owners, tensors, strict=True)]
    return merged(found, output.shape)


def _broadcasts(tensors: Sequence[Tensor], output: Tensor) -> bool:
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        return False
    rank = output.dim()
    if len(shape) > rank:
        return False
    aligned = (1,) * (rank - len(shape)) + tuple(shape)
    return all(n in (1, size) for n, size in zip(aligned, output.shape, strict=True))


def _of_matmul(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    names = ("input", "batch1", "batch2") if call.name in ("baddbmm", "addmm") else ("input", "x")
    operands = [call.argument(i, name) for i, name in enumerate(names)]
    found = []
    for tensor, own in zip(tensors, owners, strict=True):
        place = next((i for i, other in enumerate(operands[-2:]) if other is tensor), None)
        if call.name == "__rmatmul__" and place is not None:
            place = 1 - place
        if place is None:
            found.append(own)
            continue
        contracted = -1 if place == 0 or tensor.dim() == 1 else -2
        own = constant_along(own, [contracted])
        found.append(own.squeeze(contracted) if tensor.dim() == 1 else own)
        if operands[-2:][1 - place].dim() == 1:
            found[-1] = found[-1].squeeze(-1 if place == 0 else -2)
    return merged(found, output.shape)


def _of_attention(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    found = []
    for tensor, own in zip(tensors, owners, strict=True):
        is_query = tensor is call.argument(0, "query")
        found.append(constant_along(own, [-1] if is_query else [-1, -2]))
    return merged(found, output.shape)


def _of_einsum(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    """Letter by letter: one along which owners vary has to stand in the result."""
    letters, _, result = str(call.args[0]).replace(" ", "").partition("->")
    words = letters.split(",")
    operands = call.args[1:] if len(call.args) == 1 + len(words) else call.args[1]
    if "." in letters or len(result) != output.dim():
        raise Uncovered
    found = []
    for tensor, own in zip(tensors, owners, strict=True):
        word = next(w for w, other in zip(words, operands, strict=True) if other is tensor)
        gone = [word.index(letter) for letter in word if letter not in result]
        constant_along(own, gone)
        kept = [word.index(letter) for letter in result if letter in word]
        shape = [own.shape[word.index(letter)] if letter in word else 1 for letter in result]
        order = own.permute(*kept, *[axis for axis in range(own.dim()) if axis not in kept])
        found.append(order.reshape(shape))
    return merged(found, output.shape)


def _of_normalization(
    call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor
) -> Tensor:
    constant_along(owners[0], [call.argument(1, "dim", -1)])
    return owners[0]


def _of_reduction(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    source, own = tensors[0], owners[0]
    dims = call.argument(1, "dim")
    if call.name == "norm":
        dims = call.argument(2, "dim")
    if isinstance(dims, Tensor):  # torch.max of two tensors
        return merged(owners, output.shape)
    axes = range(source.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    own = constant_along(own, axes)
    if output.dim() == source.dim():
        return own
    return own.squeeze([axis % source.dim() for axis in axes])


def _of_lookup(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    return owners[0].unsqueeze(-1)


def _of_sampling(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    """(N, H, W, 2) places of a map, read into (N, D, H, W)."""
    place = next(i for i, tensor in enumerate(tensors) if tensor is call.argument(1, "grid"))
    return constant_along(owners[place], [-1]).movedim(-1, 1)


def _of_join(call: Call, tensors: Sequence[Tensor], owners: Owners, output: Tensor) -> Tensor:
    """Joined with what is shared, along an axis on which owners do not vary."""
    axis = call.argument(1, "dim", 0)
    if call.name == "stack":
        axis %= output.dim()
        return merged([own.unsqueeze(axis) for own in owners], output.shape)
    return merged([constant_along(own, [axis]) for own in owners], output.shape)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_MATMULS, _of_matmul),
    **dict.fromkeys(_JOINING, _of_join),
    **dict.fromkeys(_NORMALIZING, _of_normalization),
    **dict.fromkeys(_REDUCING, _of_reduction),
    "scaled_dot_product_attention": _of_attention,
    "einsum": _of_einsum,
    "grid_sample": _of_sampling,
    "grid_sampler": _of_sampling,
    "embedding": _of_lookup,
    "one_hot": _of_lookup,
}
