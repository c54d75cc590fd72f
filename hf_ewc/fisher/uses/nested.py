"""Tensors inside of tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What most arguments are, seen faster than that they are no mappings.
_SIMPLE = (int, float, str, type(None), slice, torch.dtype, torch.device)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings; a third of the time of `tree_leaves`."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif not isinstance(value, _SIMPLE) and isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
