"""What is known of the tensors of one batched forward, and where their uses are opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.ledger import Ledger
from hf_ewc.fisher.uses.nested import tensors_in
from hf_ewc.fisher.uses.origins import Origins
from hf_ewc.fisher.uses.owners import varying
from hf_ewc.fisher.uses.rows import RowOwners
from hf_ewc.fisher.uses.square_sum import Use
from hf_ewc.fisher.uses.table import TensorTable


class Tracker:
    """Keeps apart what is shared and what belongs to examples, in one batched forward.

    What the batch goes into *carries examples*, batch-major along the first axis (B, or B·k after
    flattening) unless rows were gathered, in which case their `owners` are followed. All other
    tensors, computed from parameters and constants alone, are *shared*.

    Args:
        ledger: where uses are opened.
        inputs: the batch.
        num_examples: B.
    """

    def __init__(self, ledger: Ledger, inputs: object, num_examples: int) -> None:
        self.ledger = ledger
        self.num_examples = num_examples
        self.recomputing = False
        # Of what was looked up with indices common to all examples: (weight, indices).
        self.lookups = TensorTable()
        # An input that requires a gradient, so that the graph reaches back to the first layer.
        self.root = torch.zeros((), requires_grad=True)
        self._origins = Origins(inputs, num_examples)
        self._rows = RowOwners(num_examples, self.is_shared)
        self._casts = TensorTable()

    # What a tensor was computed from

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on parameters and constants alone."""
        return self._origins.is_shared(tensor)

    def is_used(self, value: Any) -> bool:
        """Whether `value` is a selected parameter, or derived from one, and not yet batched."""
        return isinstance(value, Tensor) and value.requires_grad and self.is_shared(value)

    def share(self, tensor: Tensor) -> Tensor:
        """Declare that a tensor was computed from parameters and constants alone."""
        self._origins.share(tensor)
        return tensor

    def follow(self, target: Tensor, source: Tensor) -> Tensor:
        """Declare that `target`, computed in a handler, carries the examples of `source`'s rows."""
        self._origins.carry(target)
        self._rows.copy(target, source)
        return target

    def run(self, func: Callable[..., Any], *args: Any) -> Any:
        """`func(*args)` inside of a handler, its result followed."""
        result = func(*args)
        call = Call(func, func.__name__, args, {})
        self.follow_call(call, tensors_in(args), tensors_in(result))
        return result

    def follow_call(
        self,
        call: Call,
        inputs: list[Tensor],
        results: Sequence[Tensor],
        shared: Sequence[Tensor] = (),
    ) -> None:
        """Note that the results carry examples, and of which example each row is.

        `shared` are the inputs that were shared before the call.
        """
        for tensor in results:
            self._origins.carry_result(tensor)
        if call.name == "__setitem__":
            self._origins.carry(call.args[0])
            if any(tensor is call.args[0] for tensor in shared):
                self._rows.follow_writing(call)
        self._rows.follow(call, inputs, results)

    # Which example a row belongs to

    def gathered_owners(self, tensor: Tensor) -> Tensor | None:
        """The example of each row (R,) where rows were gathered, None where they are in order."""
        return self._rows.gathered(tensor)

    def element_owners(self, tensor: Tensor) -> Tensor | None:
        """The example of each element, with axes of 1 along which it does not vary.

        None where rows are in order along the first axis.
        """
        return self._rows.elements(tensor)

    def examples_first(self, tensor: Tensor) -> tuple[Tensor, int]:
        """A view with the axis in front along which owners vary, and where that axis was."""
        owners = self._rows.elements(tensor)
        axes = [] if owners is None else varying(owners)
        if len(axes) > 1:
            raise Uncovered
        if not axes or axes == [0]:
            return tensor, 0
        return self.run(torch.movedim, tensor, axes[0], 0), axes[0]

    def all_owners(self, tensor: Tensor) -> Tensor:
        """As `element_owners`, also where rows are in order."""
        return self._rows.of_elements(tensor)

    def owners(self, tensor: Tensor) -> Tensor:
        """The example of each row along the first axis, (R,)."""
        return self._rows.of(tensor)

    def rows_per_example(self, tensor: Tensor) -> int:
        """k for a tensor of B·k rows; `Uncovered` where the rows are no multiple of B."""
        return self._rows.per_example(tensor)

    def per_example(self, tensor: Tensor) -> Tensor:
        """View B·k rows of vectors, (B·k, …, D), as (B, T, D)."""
        self.rows_per_example(tensor)
        return tensor.reshape(self.num_examples, -1, tensor.shape[-1])

    # Uses

    def open(self, tensor: Tensor) -> Use | None:
        """A use for this use; None while a checkpoint recomputes (its first run opened it).

        A cast has the identity as Jacobian, so its use is a use of what was cast.
        """
        return None if self.recomputing else self.ledger.open(self._before_casts(tensor))

    def is_direct(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter, or a view or cast of one."""
        return self.ledger.is_direct(self._before_casts(tensor))

    def note_cast(self, target: Tensor, source: Tensor) -> None:
        """Note that `target` is `source` in another dtype or on another device."""
        self._casts.put(target, source)

    def _before_casts(self, tensor: Tensor) -> Tensor:
        while (source := self._casts.get(tensor)) is not None:
            tensor = source
        return tensor
