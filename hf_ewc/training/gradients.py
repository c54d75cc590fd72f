"""How the penalty reads parameters and adds to their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ewc.parameters import sharding


@dataclass(frozen=True)
class Access:
    """Reading a parameter and adding to its gradient, wherever these are kept.

    Args:
        read: the whole parameter, detached; for sharded ones a collective.
        add: adds a whole gradient, which every process has.
        add_local: adds this process's part of a gradient, flat.
    """

    read: Callable[[nn.Parameter], Tensor]
    add: Callable[[nn.Parameter, Tensor], None]
    add_local: Callable[[nn.Parameter, Tensor], None]


def gradient_of(parameter: Tensor) -> Tensor:
    """The local part of `.grad` as a flat view to add to; zeros where there was no gradient."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    if parameter.grad.is_sparse:  # of an embedding; the penalty pulls at all of its rows
        parameter.grad = parameter.grad.to_dense()
    if not sharding.local_part(parameter.grad).is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return sharding.local_part(parameter.grad).view(-1)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    shaped = gradient.reshape(sharding.whole_shape(parameter))
    _add_local(parameter, sharding.part_like(shaped, parameter).reshape(-1))


def _add_local(parameter: nn.Parameter, gradient: Tensor) -> None:
    held = gradient_of(parameter)
    held.add_(gradient.to(held.device, held.dtype))


DIRECT = Access(sharding.whole_values, _add, _add_local)
"""The parameters themselves, and their `.grad`."""
