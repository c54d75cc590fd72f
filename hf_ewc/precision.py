"""The widest floating-point numbers that a device has, for sums and probabilities."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def widest(device: torch.device) -> torch.dtype:
    """fp64; fp32 on devices that have none, such as Apple's (MPS)."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # what a device without it says differs
        return torch.float32
    return torch.float64


def widened(tensor: Tensor) -> Tensor:
    """In the widest type that its device has."""
    return tensor.to(widest(tensor.device))


def wide_sum(tensor: Tensor) -> Tensor:
    """Σ of the entries, 0-dim, in the widest type that its device has."""
    return tensor.sum(dtype=widest(tensor.device))


def uniforms_on(device: torch.device, numbers: Tensor) -> Tensor:
    """Uniform numbers in fp64 as the device can have them, still above 0 and below 1 in fp32."""
    dtype = widest(device)
    if dtype == torch.float32:
        numbers = numbers.clamp(2.0**-24, 1 - 2.0**-24)
    return numbers.to(device, dtype)
