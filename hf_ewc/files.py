"""Files that are whole or not there, and folders that one run has for itself."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_FILE = ".hf_ewc.lock"
_LEFTOVER = re.compile(r"\.ewc_state-[0-9a-f]{32}\.tmp")


def folder_to_write(folder: object) -> Path:
    """The path of a folder that is there, or that can be made.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, or a file is in its way.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder is {folder!r:.60}; needed is the path of one.")
    if not os.fspath(folder):
        raise ValueError("folder is an empty path; give the path of one ('.' for this one).")
    path = Path(folder)
    for part in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            # One look: between two of them another process may make the folder.
            if stat.S_ISDIR(part.stat().st_mode):
                break
            raise ValueError(f"{path} is to be a folder, and {part} is a file; give another path.")
    return path


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` beside `path`, flush it to the disk, and move it to `path`.

    Whoever reads `path`, also after a crash at any moment, finds the old content or the new one.
    What writers that were killed have left in the folder is removed.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(target.parent) as alone:
        replace_content(target, content)
        if alone:
            remove_leftovers(target.parent)
    return target


def replace_content(path: Path, content: bytes) -> None:
    """As `write_atomically`, for who is `alone_in` the folder already."""
    with workplace(path.parent) as place:
        (place / "content").write_bytes(content)
        move_into_place(place / "content", path)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """One writer at a time, so that none takes another's files for leftovers.

    A lock on the folder itself, which ends with the process. File systems without locks go without.

    Yields:
        Whether there is a lock.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: str | os.PathLike[str], what: str = "run") -> Iterator[None]:
    """The folder for this process alone, as long as the context lasts; made if it is not there.

    A lock on `.hf_ewc.lock` inside it, which ends with the process, however it ends; the file goes
    with the context. Unlike `alone_in` it does not wait. File systems without locks go without.

    Args:
        folder: where the run writes.
        what: what has the folder, for the message.

    Raises:
        ValueError: another process, or another context of this one, has it.
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path, what)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock goes, so that it is nobody else's yet
            os.close(descriptor)


def _locked(path: Path, what: str) -> int | None:
    """A descriptor that holds the lock on `path`; None on Windows."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(_in_use(path, what)) from None
            if _is_at(descriptor, path):  # not the file of one that has just ended
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _in_use(path: Path, what: str) -> str:
    owner = path.read_text(errors="replace")[:200] if path.is_file() else ""
    return (
        f"{path.parent} is in use by another {what}{f' ({owner})' if owner else ''}: two would "
        "write to the same files. Give this one another folder, or wait until the other has ended."
    )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for files that are not whole yet.

    A folder, since safetensors makes temporary files of its own beside the one it writes.
    """
    place = folder / f".ewc_state-{uuid.uuid4().hex}.tmp"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the workplaces of processes that were killed; for who is `alone_in` the folder."""
    for path in folder.glob(".ewc_state-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename, with both the file and its new name on disk when this returns."""
    _sync(temporary)
    os.replace(temporary, path)
    if os.name == "posix":
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
