"""When memory runs out: whether an error says so, and giving back what it held."""

from __future__ import annotations

import torch
from accelerate.utils.memory import clear_device_cache

# What allocators say that raise a plain RuntimeError: the CPU's, MPS, XPU, cuBLAS.
_SAID = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has raised `error`."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def release_memory() -> None:
    """Give back what nothing holds any more, such as the graph of a pass that has failed."""
    clear_device_cache(garbage_collection=True)
