"""Files that are whole or not there, and folders that one run has for itself."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from hf_ewc import files
from hf_ewc.files import LOCK_FILE, claimed, folder_to_write, write_atomically

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks")
FORK = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_and_die(path: Path, call: int) -> None:
    """Be killed at the `call`-th flush to the disk."""
    calls = 0

    def dying(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.fsync = dying
    write_atomically(path, "new")


@pytest.mark.parametrize(("call", "content"), [(1, "old"), (2, "new")])
def test_what_a_killed_writer_leaves_goes_with_the_next_write(tmp_path, call, content):
    path = write_atomically(tmp_path / "file", "old")
    process = FORK.Process(target=write_and_die, args=(path, call))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == content
    assert len(names(tmp_path)) == 2
    write_atomically(tmp_path / "other", b"\x00")
    assert names(tmp_path) == ["file", "other"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = write_atomically(tmp_path / "a" / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert names(path.parent) == ["file"]


def test_a_folder_is_one_runs_alone(tmp_path):
    folder = tmp_path / "run"
    with claimed(folder):
        with pytest.raises(
            ValueError, match=rf"run is in use by another run \(process {os.getpid()}"
        ):
            claimed(folder).__enter__()
        write_atomically(folder / "file", "inside")  # others may write, as the run itself does
        with claimed(tmp_path, "sequence"):
            pass
    assert names(folder) == ["file"]
    with claimed(folder):
        assert names(folder) == [LOCK_FILE, "file"]


def claim_and_wait(folder: Path, ready, end) -> None:
    with claimed(folder):
        ready.set()
        end.wait(60)


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_is_free_when_the_other_process_has_ended(tmp_path, killed):
    ready, end = FORK.Event(), FORK.Event()
    process = FORK.Process(target=claim_and_wait, args=(tmp_path, ready, end))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=f"in use by another task .process {process.pid} on"):
        claimed(tmp_path, "task").__enter__()
    if killed:
        process.kill()
    else:
        end.set()
    process.join()
    assert names(tmp_path) == ([LOCK_FILE] if killed else [])
    with claimed(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_run_that_fails_gives_its_folder_back(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path):
        raise KeyError
    with claimed(tmp_path):
        pass


def count(folder: Path) -> None:
    path = folder / "count"
    for _ in range(50):
        while True:
            try:
                with claimed(folder):
                    path.write_text(str(int(path.read_text()) + 1))
                break
            except ValueError:
                continue


def test_no_two_have_a_folder_at_once(tmp_path):
    (tmp_path / "count").write_text("0")
    processes = [FORK.Process(target=count, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "200"


def test_a_folder_that_another_process_makes_meanwhile_is_one(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    really = Path.stat

    def stat(path, **settings):
        try:
            return really(path, **settings)
        finally:
            os.makedirs(folder, exist_ok=True)

    monkeypatch.setattr(Path, "stat", stat)
    assert folder_to_write(folder) == folder
    assert folder_to_write(folder / "final") == folder / "final"


@pytest.mark.parametrize("below", ["", "run", "run/final"])
def test_a_file_in_the_way_of_a_folder_is_said(below, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'file'} is a file")):
        folder_to_write(tmp_path / "file" / below)
