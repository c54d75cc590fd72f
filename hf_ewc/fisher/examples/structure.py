"""What of a batch decides how a forward treats it: a proof on one holds for those alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from hf_ewc.fisher.examples.layout import PLAIN


def structure_of(inputs: Mapping[str, Any], size: int) -> Hashable:
    """The number of examples, dtypes, lengths of lists, values that are no tensors, of each axis
    whether it could be taken for that of the examples, and whether masks leave something out."""
    masks = [v for n, v in inputs.items() if n.endswith("mask") and isinstance(v, Tensor)]
    return size, tuple(bool((mask == 0).any()) for mask in masks), _structure(inputs, size)


def _structure(value: Any, size: int) -> Hashable:
    if isinstance(value, (Tensor, np.ndarray)):
        axes = tuple((n == 1, n == size, n % size == 0) for n in value.shape)
        return type(value).__name__, str(value.dtype), axes
    if isinstance(value, Mapping):
        return tuple((str(name), _structure(item, size)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_structure(item, size) for item in value)
    return value if isinstance(value, PLAIN) else type(value).__name__
