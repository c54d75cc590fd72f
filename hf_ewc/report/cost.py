"""Seconds and peak memory of a part of a program."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass
class Cost:
    """Wall time in seconds, and the most memory held meanwhile, in bytes.

    The memory is that of the GPUs where there are some, else the process's resident memory; None
    where the system does not tell it for a part of a program.
    """

    seconds: float = 0.0
    peak_memory: int | None = None

    def __add__(self, other: Cost) -> Cost:
        """The cost of two parts, one after the other."""
        known = [c.peak_memory for c in (self, other) if c.peak_memory is not None]
        return Cost(self.seconds + other.seconds, max(known, default=None))


@contextmanager
def measured() -> Iterator[Cost]:
    """The cost of what runs inside, filled in when it ends."""
    cost = Cost()
    counts = _begin_peak()
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begin
        cost.peak_memory = _peak() if counts else None


def _cuda() -> Any:
    """`torch.cuda` where there is a GPU and torch is loaded."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_available() else None


def _begin_peak() -> bool:
    """Let the peak begin at what is held now; whether the system can do that."""
    cuda = _cuda()
    if cuda is not None:
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # sets VmHWM to VmRSS, see proc(5)
        return True
    return False


def _peak() -> int | None:
    cuda = _cuda()
    if cuda is not None:
        return sum(int(cuda.max_memory_allocated(i)) for i in range(cuda.device_count()))
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None
