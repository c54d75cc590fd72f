"""Hashes of samples of weights, which tell whether they are the same ones in any precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ewc.parameters.sharding import is_dtensor, is_partitioned

_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
SAMPLES = 256
"""Values that are sampled of each parameter."""


def hashes(parameters: Mapping[str, Tensor]) -> list[str] | None:
    """SHA-256 of names, shapes and evenly spaced values in fp32, fp16 and bf16.

    The same base loaded in another precision has one of them in common. None where values are
    missing in this process.
    """
    if any(is_away(parameter) for parameter in parameters.values()):
        return None
    digests = {dtype: hashlib.sha256(str(dtype).encode()) for dtype in _PRECISIONS}
    for name, parameter in sorted(parameters.items()):
        sample = _sample(parameter)
        for dtype, digest in digests.items():
            digest.update(f"{name}{list(parameter.shape)}".encode())
            digest.update(sample.to(dtype).view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest() for digest in digests.values()]


def is_away(parameter: Tensor) -> bool:
    """Whether this process does not have all values of `parameter`."""
    return is_dtensor(parameter) or is_partitioned(parameter) or parameter.is_meta


def _sample(parameter: Tensor) -> Tensor:
    values = parameter.detach().reshape(-1)
    stride = max(1, values.numel() // SAMPLES)
    return values[::stride][:SAMPLES].cpu().contiguous()
