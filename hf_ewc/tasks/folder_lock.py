"""A folder for one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_ewc.files import folder_to_write

LOCK_FILE = ".run_tasks.lock"
_held_here: set[Path] = set()


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Holds `folder` inside the block; the lock ends with the process, however that ends.

    It is a lock of the process on a small file that stays there, since children of a process that
    was killed (a data loader's workers) may outlive it. File systems without locks go without.

    Raises:
        ValueError: another run holds the folder, or a file is in its place.
    """
    folder_to_write(folder).mkdir(parents=True, exist_ok=True)
    path = (folder / LOCK_FILE).resolve()
    if path in _held_here:  # a process's locks do not hold against itself
        raise _in_use(folder)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held_here.add(path)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        _held_here.discard(path)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # on Windows
        return
    try:
        # Not `lockf`, whose lock ends when this process has opened and closed the file elsewhere.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _in_use(folder) from None
    except OSError:
        return  # no locks here
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())


def _in_use(folder: Path) -> ValueError:
    with suppress(OSError, ValueError):
        holder = int((folder / LOCK_FILE).read_text())
        return ValueError(
            f"{folder} is in use by another run (process {holder}). Wait for it to end, or choose "
            "another output_dir."
        )
    return ValueError(
        f"{folder} is in use by another run. Wait for it to end, or choose another output_dir."
    )
