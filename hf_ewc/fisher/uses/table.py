"""A property of tensors, by identity."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class TensorTable:
    """A property of tensors, kept by identity for as long as each tensor lives."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def put(self, tensor: Tensor, value: Any = True) -> None:
        self._entries[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Any:
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def drop(self, tensor: Tensor) -> None:
        self._entries.pop(id(tensor), None)
