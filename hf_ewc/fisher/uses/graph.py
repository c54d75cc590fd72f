"""Looks into an autograd graph: which leaves it reaches."""

from __future__ import annotations

from torch import Tensor


def leaves(tensor: Tensor) -> list[Tensor]:
    """The leaf tensors that the autograd graph of `tensor` reaches."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    return [leaf for leaf, _ in leaf_uses(tensor)]


def leaf_uses(tensor: Tensor) -> list[tuple[Tensor, str]]:
    """Each leaf that the graph of `tensor` reaches, with the operation that uses it."""
    found: dict[int, tuple[Tensor, str]] = {}
    seen = {tensor.grad_fn}
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                found.setdefault(id(leaf), (leaf, node.name()))
            else:
                seen.add(following)
                stack.append(following)
    return list(found.values())
