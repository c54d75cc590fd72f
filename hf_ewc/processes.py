"""The processes that train together: which one writes, and whether a launcher started them all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

# Where launchers and MPI say how many processes they started, and which one this is; Accelerate
# reads the same names.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_MEETING_POINT = {"MASTER_ADDR", "MASTER_PORT"}


def is_main_process() -> bool:
    """Whether this is the process that writes: rank 0, or the only one.

    Before the processes are connected (TrainingArguments does it) the launcher's word counts.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _from_environment(_RANKS)


def leave() -> None:
    """Disconnect from the other processes, as the last act of a script.

    A thread of gloo may still hold the tensors of the last collective. It needs the interpreter to
    let go of them, and aborts the process if that is shutting down by then (torch 2.13); so it gets
    the time to do it first.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.1)
        dist.destroy_process_group()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended (other threads never get it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if held:
        signal.raise_signal(signal.SIGINT)


def _from_environment(names: Sequence[str]) -> int | None:
    """The number under the first of `names` that is set."""
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def check_launch(num_processes: int) -> None:
    """Refuse a launch of which fewer processes came than were asked for.

    On a machine without GPU some ways to launch several processes start one, without a word, or
    several that know nothing of each other and write to the same files.

    Args:
        num_processes: those that train together, as `accelerator.num_processes` has it.

    Raises:
        ValueError: with what was asked for, what was found, and what to do.
    """
    started = _from_environment(_SIZES)
    if started is not None and num_processes < started:
        raise ValueError(
            f"{started} processes were launched, but only {num_processes} would train here: they "
            "are not connected, and each would train a model of its own into the same files. On a "
            "machine without GPU pass use_cpu=True (--use_cpu) to TrainingArguments, which "
            "connects them by gloo; with GPUs see that torch.cuda.is_available() holds. For one "
            "process, launch one, with WORLD_SIZE=1 or unset."
        )
    if started is None and num_processes == 1 and _asked_accelerate_for_several():
        raise ValueError(
            "accelerate launch was asked for more than one process, but it started one. It does "
            "so with --cpu, with MULTI_CPU, and without --multi_gpu where it finds fewer than two "
            "GPUs. Use --multi_gpu --num_processes N, and without GPUs also use_cpu=True "
            "(--use_cpu) in TrainingArguments; recipes/accelerate/cpu_2.yaml is an example. For "
            "one process use --num_processes 1."
        )


def _asked_accelerate_for_several() -> bool:
    """Whether Accelerate's launcher for one process was asked for more.

    It then sets where the processes are to meet, and still starts only one. Where that was set
    already when the launcher was called, it tells nothing.
    """
    if "ACCELERATE_USE_CPU" not in os.environ:  # not started by that launcher
        return False
    return os.environ.keys() >= _MEETING_POINT and not (_names_in_parent() & _MEETING_POINT)


def _names_in_parent() -> set[str]:
    """Names in the environment that the parent process began with; none where they are hidden."""
    try:
        content = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return set()
    return {entry.partition(b"=")[0].decode(errors="replace") for entry in content.split(b"\0")}
