"""Processes that are killed, or read and write at once, leave a whole state."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stored import files, make

from hf_ewc import EWCState
from hf_ewc.state import storage
from tests.processes import FORKS


def test_reading_while_another_process_saves(tmp_path, monkeypatch):
    """The tensor file may go after the JSON is read: then the new state is read."""
    make(1.0).save_pretrained(tmp_path)
    original = storage._tensor_path

    def slow(folder: Path, name: str) -> Path:
        monkeypatch.setattr(storage, "_tensor_path", original)
        make(2.0).save_pretrained(tmp_path)
        return original(folder, name)

    monkeypatch.setattr(storage, "_tensor_path", slow)
    assert EWCState.from_pretrained(tmp_path) == make(2.0)


# Processes that are killed


def save_for_ever(folder: Path, ready) -> None:
    torch.set_num_threads(1)
    states = [make(value, rows=2000) for value in (2.0, 3.0)]
    ready.set()
    while True:
        for state in states:
            # A new object: one that was saved before would not write its tensors again.
            replace(state, importance=dict(state.importance)).save_pretrained(folder)
            storage.save_reference(folder, folder / "checkpoint-1")


def save_until(folder: Path, call: int, before: bool) -> None:
    """Save once, and be killed before or after the `call`-th change to the file system."""
    torch.set_num_threads(1)
    calls = 0

    def dying(function):
        def changed(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return changed

    storage.save_file = dying(storage.save_file)
    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    Path.unlink, Path.write_bytes = dying(Path.unlink), dying(Path.write_bytes)
    Path.mkdir, shutil.rmtree = dying(Path.mkdir), dying(shutil.rmtree)
    make(2.0).save_pretrained(folder)
    storage.save_reference(folder, folder / "checkpoint-1")
    os._exit(0)


def loaded_value(folder: Path, rows: int = 40) -> float:
    """Which state the folder holds, whole."""
    state = EWCState.from_pretrained(folder)
    value = state.metadata["value"]
    assert state == make(value, rows)
    return float(value)


def test_killed_at_every_change_of_the_file_system(tmp_path):
    seen, call = set(), 0
    while True:
        call += 1
        codes = set()
        for before in (True, False):
            folder = tmp_path / f"{call}-{before}"
            make(1.0).save_pretrained(folder)
            storage.save_reference(folder, folder / "checkpoint-1")
            process = FORKS.Process(target=save_until, args=(folder, call, before))
            process.start()
            process.join(60)
            codes.add(process.exitcode)
            seen.add((loaded_value(folder), loaded_value(folder / "checkpoint-1")))
            make(3.0).save_pretrained(folder)
            storage.save_reference(folder, folder / "checkpoint-1")
            make(3.0).save_pretrained(folder)
            assert len(files(folder)) == 3
        assert codes <= {0, -signal.SIGKILL}
        if codes == {0}:
            break
    assert call > 10
    assert seen == {(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)}


def test_killed_at_random_moments(tmp_path):
    chance = random.Random(0)
    make(1.0, rows=2000).save_pretrained(tmp_path)
    storage.save_reference(tmp_path, tmp_path / "checkpoint-1")
    for _ in range(20):
        ready = FORKS.Event()
        process = FORKS.Process(target=save_for_ever, args=(tmp_path, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(chance.uniform(0.0, 0.06))
        assert process.is_alive()
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert loaded_value(tmp_path, 2000) in (1.0, 2.0, 3.0)
        assert loaded_value(tmp_path / "checkpoint-1", 2000) in (1.0, 2.0, 3.0)
    storage.save_reference(tmp_path, tmp_path / "checkpoint-1")
    make(4.0, rows=2000).save_pretrained(tmp_path)
    assert len(files(tmp_path)) == 4


def save_often(folder: Path, value: float) -> None:
    for _ in range(30):
        make(value).save_pretrained(folder, is_main_process=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_writers_wait_for_each_other(tmp_path):
    make(1).save_pretrained(tmp_path)
    writers = [FORKS.Process(target=save_often, args=(tmp_path, value)) for value in (2.0, 3.0)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(EWCState.from_pretrained(tmp_path).metadata["value"])
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {1, 2, 3}
    assert len(files(tmp_path)) == 2
