"""A task's own classes on a shared classification head: a mask on the logits inside the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_ewc.parameters.names import unwrap

# exp(-1e4) is 0 in every dtype, so the softmax and its gradient are exactly 0 for such a class, and
# so is a sigmoid's; yet it is finite in every dtype, also when summed, so no NaN comes of it.
MASKED = -1e4


class ClassMask:
    """Restricts a classifier to some of its classes: p(y | x, y ∈ S), zero outside S.

    As a context manager it hooks the linear layer that makes the logits; `only(classes)` then holds
    for the loss, for evaluation and for the Fisher alike, since all of them see the model's logits.
    The other classes' rows of the head get a gradient of exactly 0, so tasks with disjoint classes
    have heads of their own.

    Args:
        model: a model with a linear classification head, wrapped or not.

    Raises:
        ValueError: no linear layer makes as many outputs as the model has labels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.heads = classification_heads(model)
        self.num_classes = int(self.heads[0].out_features)
        # Written in place: a compiled forward sees the change without compiling anew.
        self.masked = torch.zeros(self.num_classes, dtype=torch.bool)
        self._by_row: Tensor | None = None
        self._handles: list[Any] = []

    @property
    def is_attached(self) -> bool:
        """Whether it masks a model at present."""
        return bool(self._handles)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without its hooks inside the block."""
        active = self.is_attached
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            if active:
                self.__enter__()

    def move_to(self, model: nn.Module) -> None:
        """Mask the heads of another model of the same kind from now on, in place of these."""
        with self.lifted():
            self.heads = classification_heads(model)

    def __enter__(self) -> ClassMask:
        self._handles = [head.register_forward_hook(self._mask) for head in self.heads]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def only(self, classes: Sequence[int] | None) -> Iterator[None]:
        """Let only these classes through inside the block; None lets all through."""
        before, by_row = self.masked.clone(), self._by_row
        self._by_row = None
        masked = torch.zeros(self.num_classes, dtype=torch.bool)
        if classes is not None:
            self.check(classes)
            masked.fill_(True)
            masked[list(classes)] = False
        self.masked.copy_(masked)
        try:
            yield
        finally:
            self.masked.copy_(before)
            self._by_row = by_row

    @contextmanager
    def only_by_row(self, classes: Sequence[Sequence[int] | None]) -> Iterator[None]:
        """Let only these classes through for each row of a batch; None lets all through."""
        masked = torch.zeros(len(classes), self.num_classes, dtype=torch.bool)
        for row, own in enumerate(classes):
            if own is not None:
                masked[row] = True
                masked[row, list(own)] = False
        self._by_row = masked
        try:
            yield
        finally:
            self._by_row = None

    def check(self, classes: Sequence[int]) -> None:
        """Raise a `ValueError` unless these are different classes of the head."""
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes are {list(classes)}; at least one, each once, is needed.")
        if min(classes) < 0 or max(classes) >= self.num_classes:
            raise ValueError(
                f"classes are {list(classes)}; the model's head has {self.num_classes}, "
                f"numbered from 0."
            )

    def _mask(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if self._by_row is not None:
            shape = (len(self._by_row), *(1,) * (logits.dim() - 2), self.num_classes)
            return logits.masked_fill(self._by_row.to(logits.device).view(shape), MASKED)
        if self.masked.device != logits.device:
            self.masked = self.masked.to(logits.device)
        # A copy: the mask may change between the forward and the backward.
        return logits.masked_fill(self.masked.clone(), MASKED)


def classification_heads(model: nn.Module) -> list[nn.Linear]:
    """The linear layers outside the backbone with one output for each label.

    There may be several, as in DeiT, which averages two. For a module that is no `PreTrainedModel`
    it is the last linear layer.

    Raises:
        ValueError: there is none.
    """
    plain = unwrap(model)
    get_base: Any = getattr(plain, "get_base_model", None)
    inner = get_base() if get_base is not None else plain  # inside a PeftModel
    linear = {
        name: module
        for name, module in inner.named_modules()
        if hasattr(module, "out_features") and isinstance(module, nn.Linear) and "lora_" not in name
    }
    labels = getattr(getattr(inner, "config", None), "num_labels", None)
    if labels is None:
        heads = list(linear.values())[-1:]
    else:
        backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or " ", None)
        inside = set(backbone.modules()) if isinstance(backbone, nn.Module) else set()
        heads = [m for m in linear.values() if m.out_features == labels and m not in inside]
    if not heads:
        raise ValueError(
            f"{type(inner).__name__} has no linear head with {labels} outputs; "
            f"classes= needs one. Set num_labels to the number of all tasks' classes."
        )
    return heads
