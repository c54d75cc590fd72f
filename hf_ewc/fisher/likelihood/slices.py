"""What is done with outputs as large as a vocabulary for each position: a slice at a time.

The outputs of a language model are the largest tensors that there are, (B, T, V), and often half of
what a training step needs. Nothing here makes another of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED
from hf_ewc.precision import widened

# Elements of one slice.
_SLICE = 1 << 20
# Outputs that differ by more than this share of their standard deviation are not the same.
_FAR = 1e-3


def unseen() -> AbstractContextManager[Any]:
    """Inside, no interception of torch functions sees what is computed.

    What is done with outputs uses no parameters, and to note which example each of B·T·V elements
    belongs to takes more memory than the elements.
    """
    return torch._C.DisableTorchFunction()


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors that share the leading axes of the first, at most `_SLICE` elements of it.

    Its last axis stays whole.
    """
    first = tensors[0]
    if first.numel() <= _SLICE or first.dim() < 2:
        yield tensors
    elif len(first) == 1:
        yield from slices(*(tensor[0] for tensor in tensors))
    else:
        rows = max(1, _SLICE * len(first) // first.numel())
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield from slices(*parts)


def rows_in_slice(width: int) -> int:
    """How many rows of this width one slice holds."""
    return max(1, _SLICE // max(width, 1))


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, rounding and what is infinite apart."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and torch.equal(one, other):  # as where the same was computed twice
        return True
    difference, largest, sums = 0.0, 0.0, torch.zeros(3, dtype=torch.float64)
    for a, b in slices(one, other):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return False
        if not finite.all():
            a, b = a[finite], b[finite]
        a, b = widened(a), widened(b)
        if b.numel():
            difference = max(difference, float((a - b).abs().max()))
            largest = max(largest, float(b.abs().max()))
            sums += torch.stack([b.new_tensor(b.numel()), b.sum(), b.square().sum()]).cpu()
    count, total, squares = sums.tolist()
    if not count:
        return True
    deviation = max(squares / count - (total / count) ** 2, 0.0) ** 0.5
    allowed: float = _FAR * deviation + 16 * torch.finfo(other.dtype).eps * largest
    return difference <= allowed


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ_n log softmax(l_n)[y_n], differentiable: `logits` (..., C), `labels` (...), −100 for none.

    In fp32 or wider. Beside the logits there is only their gradient, in their own type.
    """
    apply: Any = _LogLikelihood.apply
    total: Tensor = apply(logits, labels)
    return total


class _LogLikelihood(torch.autograd.Function):
    """∂/∂l_n = e_{y_n} − softmax(l_n)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for part, own in slices(logits, labels):
            there = own != IGNORED
            log_p = part.to(total.dtype).log_softmax(-1)
            picked = log_p.gather(-1, own.masked_fill(~there, 0).unsqueeze(-1)).squeeze(-1)
            total += picked.masked_fill(~there, 0.0).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        found = torch.empty_like(logits)
        for part, own, gradient in slices(logits, labels, found):
            there = (own != IGNORED).unsqueeze(-1)
            own = own.unsqueeze(-1).masked_fill(~there, 0)
            slope = part.to(outer[0].dtype).softmax(-1).neg_()
            slope.scatter_add_(-1, own, torch.ones_like(own, dtype=slope.dtype))
            gradient.copy_((slope * outer[0]).masked_fill_(~there, 0.0))
        return found, None
