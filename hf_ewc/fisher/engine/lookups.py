"""Gradients of large embeddings as the rows that were looked up, of one example few of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Entries of a table from which on it costs more to write zeros than to keep rows apart.
_LARGE = 1 << 20
# So many times more rows has the table than are looked up.
_FEW = 8


class RowsOnly(TorchFunctionMode):
    """Within, a look-up in a large table on a CPU has a sparse gradient, of the same values.

    Args:
        parameters: those whose gradients may be sparse: nothing else waits for them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._large = {id(p) for p in parameters if _is_large(p)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and self._large:
            return _look_up(self._large, *args, **kwargs)
        return func(*args, **kwargs)


def _look_up(
    large: set[int],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    few = input.numel() * _FEW <= len(weight)
    rows_only = few and id(weight) in large and not scale_grad_by_freq
    return F.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse or rows_only
    )


def _is_large(parameter: nn.Parameter) -> bool:
    return (
        parameter.dim() == 2
        and parameter.device.type == "cpu"
        and parameter.layout == torch.strided
        and parameter.numel() >= _LARGE
        and not parameter._backward_hooks
    )


def is_rows_only(gradient: Tensor) -> bool:
    """Whether `gradient` holds rows of a matrix, by their places."""
    return gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1
