"""What a tensor was computed from: from parameters and constants alone, or from the batch."""

from __future__ import annotations

from torch import Tensor, nn

from hf_ewc.fisher.uses.nested import tensors_in
from hf_ewc.fisher.uses.table import TensorTable

# Nodes of a graph up to which it is searched for what it was built on.
_SMALL_GRAPH = 64


class Origins:
    """Tells what *carries examples* from what is *shared* by all of them.

    Args:
        inputs: the batch.
        num_examples: B.
    """

    def __init__(self, inputs: object, num_examples: int) -> None:
        self._carriers = TensorTable()
        self._derived = TensorTable()
        for tensor in tensors_in(inputs):
            if tensor.dim() == 0 or tensor.shape[0] != 1 or num_examples == 1:
                self._carriers.put(tensor)  # one row for all examples belongs to none

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on parameters and constants alone.

        What requires a gradient and was not seen to be computed may hide examples, unless it is a
        parameter, which a model may also make of another in its forward.
        """
        if self._carriers.get(tensor):
            return False
        known = not tensor.requires_grad or self._derived.get(tensor)
        return bool(known or isinstance(tensor, nn.Parameter) or self._came_through(tensor))

    def share(self, tensor: Tensor) -> None:
        """`tensor` was computed from what is shared."""
        if tensor.requires_grad and not self._carriers.get(tensor):
            self._derived.put(tensor)

    def carry(self, tensor: Tensor) -> None:
        """`tensor` was computed from what carries examples."""
        self._carriers.put(tensor)

    def carry_result(self, tensor: Tensor) -> None:
        """As `carry`, unless what came out was shared before."""
        if not self._derived.get(tensor):
            self._carriers.put(tensor)

    def _came_through(self, tensor: Tensor) -> bool:
        """Whether this was computed from parameters and then went through a function unseen.

        FSDP2 and DeepSpeed send what modules take and return through autograd functions of theirs.
        """
        found = _near_leaves(tensor)
        shared = bool(found) and all(isinstance(leaf, nn.Parameter) for leaf in found)
        (self._derived if shared else self._carriers).put(tensor)
        return shared


def _near_leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves of a small autograd graph; none where it is large, as what carries examples has.

    That was built on `Tracker.root`, which is a leaf and no parameter.
    """
    found: list[Tensor] = []
    seen = {tensor.grad_fn}
    stack = [tensor.grad_fn]
    while stack and len(seen) < _SMALL_GRAPH:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                found.append(leaf)
            elif following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return [] if stack else found
