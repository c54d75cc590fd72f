"""Files of a state: exactness, damage, processes that are killed, the Hub."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from hf_ewc import EWCState, Fisher
from hf_ewc.files import sha256
from hf_ewc.state import document, hub, storage
from hf_ewc.state.document import STATE_FILE, encoded
from hf_ewc.state.ewc_state import TaskRecord
from tests.processes import FORKS

RECORD = TaskRecord("digits | 1", 200, "exact", 0.5, "2026-11-24T03:00:00+00:00")


def make(value: float = 1.0, rows: int = 40, columns: int = 30) -> EWCState:
    """A state in which every number says which one it is."""
    torch.manual_seed(0)
    names = {"body.weight": (rows, columns), "body.bias": (rows,), "scale": ()}
    return EWCState(
        {name: torch.rand(shape) + value for name, shape in names.items()},
        {name: torch.randn(shape) + value for name, shape in names.items()},
        {"scale": value / 3},
        (RECORD,) * int(value),
        {"value": value, "note": "Übung", "list": [1, 2]},
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def tensor_file(folder: Path) -> Path:
    return folder / storage.tensor_file(folder)


@pytest.mark.parametrize(
    "packing",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"keep_fraction": 0.1},
        {"dtype": "bfloat16", "keep_fraction": 0.3},
    ],
)
def test_what_is_read_is_what_was_saved(tmp_path, packing):
    state = make().pack(**packing)
    state.save_pretrained(tmp_path / "new" / "folder")
    loaded = EWCState.from_pretrained(tmp_path / "new" / "folder")
    assert loaded == state
    assert list(loaded.importance) == list(state.importance)
    assert loaded.nbytes == state.nbytes
    assert loaded.offset == state.offset
    assert loaded.tasks == (RECORD,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_anchors_keep_their_dtype(tmp_path, dtype):
    model = torch.nn.Linear(3, 2).to(dtype)
    fisher = Fisher({name: torch.ones(p.shape) for name, p in model.named_parameters()})
    state = EWCState().consolidate(fisher, model)
    state.save_pretrained(tmp_path)
    loaded = EWCState.from_pretrained(str(tmp_path))
    assert loaded == state
    assert loaded.packed("weight")[1].values.dtype == dtype
    assert torch.equal(loaded.anchor["weight"].to(dtype), model.weight.detach())


def test_the_empty_state(tmp_path):
    EWCState().save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == EWCState()


@pytest.mark.parametrize(
    ("packing", "entry"), [({}, 8), ({"dtype": "bfloat16"}, 6), ({"keep_fraction": 0.1}, 1.2)]
)
def test_size_on_disk(tmp_path, packing, entry):
    state = make(rows=3000).pack(**packing)
    state.save_pretrained(tmp_path)
    entries = 3000 * 30 + 3000 + 1
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert state.nbytes <= entry * entries + 20
    assert state.nbytes < size < state.nbytes + 3000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_mapped_from_the_file(tmp_path):
    make(rows=20000).save_pretrained(tmp_path)
    loaded = EWCState.from_pretrained(tmp_path)
    assert tensor_file(tmp_path).name in Path("/proc/self/maps").read_text()
    assert loaded.importance["scale"].device.type == "cpu"


def test_only_the_current_state_stays(tmp_path):
    of_a_killed_process = tmp_path / f".ewc_state-{'0' * 32}.tmp"
    of_a_killed_process.mkdir()
    (of_a_killed_process / "tensors").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    for value in (1.0, 2.0, 3.0):
        make(value).save_pretrained(tmp_path)
    names = ["ewc_state.json", tensor_file(tmp_path).name, "model.safetensors"]
    assert files(tmp_path) == sorted(names)
    assert EWCState.from_pretrained(tmp_path) == make(3.0)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
def test_others_may_read_what_the_umask_lets_them(tmp_path):
    former = os.umask(0o027)
    try:
        make().save_pretrained(tmp_path)
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_saving_again_does_not_write_the_tensors_again(tmp_path):
    state = make()
    state.save_pretrained(tmp_path)
    inode = tensor_file(tmp_path).stat().st_ino
    state.save_pretrained(tmp_path)
    assert tensor_file(tmp_path).stat().st_ino == inode
    os.truncate(tensor_file(tmp_path), 10)
    state.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == state
    state.save_pretrained(tmp_path / "other")
    assert EWCState.from_pretrained(tmp_path / "other") == state


def test_a_process_that_only_gathers_writes_nothing(tmp_path):
    make().save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


# Checkpoints


def test_checkpoints_refer_to_the_folder_above(tmp_path):
    for value in (1.0, 2.0):
        make(value).save_pretrained(tmp_path)
        (tmp_path / f"checkpoint-{value:.0f}").mkdir()
        storage.save_reference(tmp_path, tmp_path / f"checkpoint-{value:.0f}")
    assert files(tmp_path / "checkpoint-1") == ["ewc_state.json"]
    make(3.0).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for value in (1.0, 2.0):
        assert EWCState.from_pretrained(tmp_path / f"checkpoint-{value:.0f}") == make(value)
    shutil.rmtree(tmp_path / "checkpoint-1")
    make(4.0).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert EWCState.from_pretrained(tmp_path / "checkpoint-2") == make(2.0)


def test_a_checkpoint_alone_says_what_is_missing(tmp_path):
    make().save_pretrained(tmp_path / "run")
    storage.save_reference(tmp_path / "run", tmp_path / "run" / "checkpoint-1")
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"neither in .* nor in the folder above; copy it"):
        EWCState.from_pretrained(tmp_path / "elsewhere" / "checkpoint-1")


def test_a_reference_goes_directly_inside(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not directly inside"):
        storage.save_reference(tmp_path, tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="holds no EWC state"):
        storage.save_reference(tmp_path / "none", tmp_path / "none" / "checkpoint-1")


# Damage


def refuse(folder: Path, message: str = "damaged") -> None:
    with pytest.raises(ValueError, match=message):
        EWCState.from_pretrained(folder)


def test_truncated_files_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    for path in (tmp_path / STATE_FILE, tensor_file(tmp_path)):
        whole = path.read_bytes()
        for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            refuse(tmp_path)
        path.write_bytes(whole + b"\n")
        refuse(tmp_path)
        path.write_bytes(whole)
    assert EWCState.from_pretrained(tmp_path) == make()


def test_every_flipped_byte_of_the_json_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= (0x01, 0x10, 0x20, 0x80)[position % 4]
        path.write_bytes(damaged)
        refuse(tmp_path, "damaged|has format")


def test_flipped_bytes_of_the_tensors_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tensor_file(tmp_path)
    whole = path.read_bytes()
    positions = [*range(64), *range(64, len(whole), len(whole) // 64), len(whole) - 1]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        refuse(tmp_path, "SHA-256")


def test_a_newer_format_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / STATE_FILE
    document = json.loads(path.read_text())
    for version in (2, 99):
        path.write_text(json.dumps({**document, "format_version": version}))
        refuse(tmp_path, f"has format {version}; this version of hf-ewc reads up to 1")
    for version in (0, -1, None, "1", 1.5, True):
        path.write_text(json.dumps({**document, "format_version": version}))
        refuse(tmp_path)
    path.write_text("[]")
    refuse(tmp_path)


def test_a_missing_tensor_file_is_named(tmp_path):
    make().save_pretrained(tmp_path)
    name = tensor_file(tmp_path).name
    (tmp_path / name).unlink()
    refuse(tmp_path, f"refers to {name}, which is neither")


def rewrite(folder: Path, tensors=None, change=None) -> None:
    """Write other content with right hashes, as a program that knows the format could."""
    tensors = tensors or storage.load_file(tensor_file(folder))
    path = folder / STATE_FILE
    document = json.loads(path.read_text())
    storage.save_file(tensors, folder / "changed")
    digest = sha256(folder / "changed")
    size = (folder / "changed").stat().st_size
    name = f"ewc_state-{digest[:16]}.safetensors"
    document["tensors"] = {"file": name, "sha256": digest, "bytes": size}
    shutil.move(folder / "changed", folder / name)
    if change is not None:
        change(document)
    path.write_bytes(encoded(document))


def set_to(*path_and_value):
    *path, key, value = path_and_value

    def change(document):
        for part in path:
            document = document[part]
        document[key] = value

    return change


DOCUMENTS = {
    "a further key": set_to("colour", "red"),
    "a shape": set_to("parameters", "scale", "shape", [3]),
    "a shape below 0": set_to("parameters", "scale", "shape", [-1]),
    "a shape of floats": set_to("parameters", "body.bias", "shape", [40.0]),
    "a shape beyond int64": set_to("parameters", "scale", "shape", [2**70]),
    "no shape": set_to("parameters", "scale", "shape", None),
    "a file elsewhere": set_to("tensors", "file", "../elsewhere.safetensors"),
    "a file that is none": set_to("tensors", "file", 7),
    "a size that is none": set_to("tensors", "bytes", "many"),
    "a task with more": set_to("tasks", 0, "colour", "red"),
    "a task that is none": set_to("tasks", 0, "digits"),
    "tasks that are none": set_to("tasks", {"name": "digits"}),
    "a task's name": set_to("tasks", 0, "name", ["digits"]),
    "a task's weight": set_to("tasks", 0, "weight", "heavy"),
    "a task's weight below 0": set_to("tasks", 0, "weight", -1),
    "a weight of 400 digits": set_to("tasks", 0, "weight", 10**400),
    "a task's examples": set_to("tasks", 0, "num_examples", 2.5),
    "parameters in a list": set_to("parameters", ["scale"]),
    "a parameter that is none": set_to("parameters", "scale", 3),
    "one parameter more": set_to("parameters", "x", {"shape": [], "scale": 1.0, "offset": 0.0}),
    "a scale that is text": set_to("parameters", "scale", "scale", "1"),
    "a scale of 0": set_to("parameters", "scale", "scale", 0.0),
    "a scale of 400 digits": set_to("parameters", "scale", "scale", 10**400),
    "a scale that overflows": set_to("parameters", "body.weight", "scale", 1e38 * 3),
    "an offset that is true": set_to("parameters", "scale", "offset", True),
    "an offset below 0": set_to("parameters", "scale", "offset", -0.5),
    "an offset of 400 digits": set_to("parameters", "scale", "offset", 10**400),
    "metadata in a list": set_to("metadata", []),
}


@pytest.mark.parametrize("change", DOCUMENTS)
def test_documents_that_are_whole_but_wrong_are_refused(tmp_path, change):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == make()
    rewrite(tmp_path, change=DOCUMENTS[change])
    refuse(tmp_path, "damaged|make no state|neither in")


def of(value):
    return lambda tensor: torch.full_like(tensor, value)


DENSE = {
    "below 0": ("importance/body.bias", torch.neg),
    "not a number": ("anchor/scale", of(torch.nan)),
    "infinite": ("importance/body.weight", of(torch.inf)),
    "missing": ("anchor/scale", None),
    "integers": ("importance/body.bias", lambda t: t.long()),
    "truths": ("anchor/body.bias", lambda t: t > 0),
    "another shape": ("importance/body.weight", lambda t: t.t().contiguous()),
    "flat": ("anchor/body.weight", lambda t: t.flatten()),
    "8 bits without exponents": ("importance/body.bias", lambda t: t.to(torch.float8_e4m3fn)),
    "positions of all": ("indices/body.weight", torch.arange(40 * 32)),
    "exponents of all": ("exponents/body.bias", torch.zeros(40, dtype=torch.int8)),
    "something else": ("colour/body.bias", torch.zeros(1)),
}


SPARSE = {
    "twice": ("indices/body.weight", lambda t: t[:1].repeat(len(t))),
    "in another order": ("indices/body.weight", lambda t: t.flip(0)),
    "below 0": ("indices/body.weight", lambda t: t - t[0] - 1),
    "beyond the end": ("indices/body.weight", lambda t: t - t[-1] + 1200),
    "as floats": ("indices/body.weight", lambda t: t.float()),
    "as truths": ("indices/body.weight", lambda t: t > 0),
    "as bytes": ("indices/body.weight", lambda t: (t % 200).to(torch.uint8)),
    "on two axes": ("indices/body.weight", lambda t: t.unsqueeze(0)),
    "fewer": ("indices/body.weight", lambda t: t[:-1]),
    "none": ("indices/body.weight", None),
    "values on two axes": ("importance/body.weight", lambda t: t.unsqueeze(0)),
    "fewer anchors": ("anchor/body.weight", lambda t: t[:-1]),
}
EIGHT = {
    "no exponents": ("exponents/body.weight", None),
    "wide exponents": ("exponents/body.weight", lambda t: t.int()),
    "fewer exponents": ("exponents/body.weight", lambda t: t[:-1]),
    "flat exponents": ("exponents/body.weight", lambda t: t.flatten()),
    "large exponents": ("exponents/body.weight", of(127)),
    "not a number": (
        "importance/body.weight",
        lambda t: torch.full(t.shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn),
    ),
    "signs": ("importance/body.weight", lambda t: (-t.float()).to(torch.float8_e4m3fn)),
    "values that are wide": ("importance/body.weight", lambda t: t.float()),
}
FORMS = {"dense": ({}, DENSE), "sparse": ({"keep_fraction": 0.1}, SPARSE)}
FORMS["eight bits"] = ({"dtype": "float8"}, EIGHT)


@pytest.mark.parametrize(
    ("form", "change"), [(form, change) for form, (_, kinds) in FORMS.items() for change in kinds]
)
def test_tensors_that_are_whole_but_wrong_are_refused(tmp_path, form, change):
    """With right hashes: what the tensors hold is looked at as well."""
    options, changes = FORMS[form]
    state = make(columns=32).pack(**options)
    state.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == state
    tensors = storage.load_file(tensor_file(tmp_path))
    name, new = changes[change]
    if new is None:
        del tensors[name]
    else:
        tensors[name] = new if isinstance(new, torch.Tensor) else new(tensors[name])
    rewrite(tmp_path, tensors)
    refuse(tmp_path, "damaged|make no state")


# What is no file of a state, or too large for one


def is_refused_soon(folder: Path, message: str) -> None:
    """In a process of its own, which a hang cannot hold up."""
    process = FORKS.Process(target=refuse, args=(folder, message))
    process.start()
    process.join(60)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung
    assert process.exitcode == 0


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "socket", "folder", "large"])
def test_what_is_no_regular_file_of_a_fit_size_is_refused(tmp_path, kind, monkeypatch):
    make().save_pretrained(tmp_path)
    path = tmp_path / STATE_FILE
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes
            bound.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 20 << 30)
    is_refused_soon(tmp_path, "damaged")


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_below_holds_no_writer_up(tmp_path):
    """Saving looks into the folders below for references."""
    make(1).save_pretrained(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    os.mkfifo(tmp_path / "checkpoint-1" / STATE_FILE)
    process = FORKS.Process(target=make(2).save_pretrained, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert EWCState.from_pretrained(tmp_path) == make(2)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_a_tensor_file_that_is_none_is_refused(tmp_path, kind):
    make().save_pretrained(tmp_path)
    path = tensor_file(tmp_path)
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        os.truncate(path, 20 << 30)
    is_refused_soon(tmp_path, "neither in|damaged")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_deep_and_long_json_is_refused(tmp_path, text):
    make().save_pretrained(tmp_path)
    (tmp_path / STATE_FILE).write_text(text)
    refuse(tmp_path)


def test_metadata_that_no_file_could_hold_are_refused(tmp_path, monkeypatch):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="JSON"):
        EWCState(metadata={"deep": deep})
    monkeypatch.setattr(document, "LARGEST_DOCUMENT", 1000)
    with pytest.raises(ValueError, match="keep what is large out of the metadata"):
        EWCState(metadata={"long": "x" * 1000}).save_pretrained(tmp_path)


# What is handed out


def test_what_is_handed_out_does_not_change_the_state(tmp_path):
    state = make()
    state.save_pretrained(tmp_path)
    state.importance["body.weight"].mul_(2)
    state.anchor["body.weight"].data.fill_(7.0)
    state.anchor["scale"].numpy()[...] = 3.0
    state.metadata["list"].append(4)
    with pytest.raises(TypeError):
        state.metadata["value"] = 2
    with pytest.raises(TypeError):
        state.offsets["scale"] = 2.0
    for name, tensor in state.importance.items():
        tensor.zero_()
        assert bool((state.importance[name] > 0).all())
    assert state == make()
    state.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == make()


@pytest.mark.parametrize("part", [0, 1])
def test_tensors_changed_where_they_are_held_are_written_again(tmp_path, part):
    """Not through what the state hands out, but behind its back."""
    state = make()
    state.save_pretrained(tmp_path)
    state.packed("body.weight")[part].values.mul_(2)
    state.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == state
    assert state != make()


def test_a_state_with_other_words_has_the_same_tensor_file(tmp_path):
    state = make()
    state.save_pretrained(tmp_path)
    inode = tensor_file(tmp_path).stat().st_ino
    other = replace(state, metadata={"new": 1}, tasks=())
    other.save_pretrained(tmp_path)
    assert tensor_file(tmp_path).stat().st_ino == inode
    assert EWCState.from_pretrained(tmp_path) == other
    less = other.without(["scale"])
    less.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == less


def test_what_is_no_state_is_refused(tmp_path):
    refuse(tmp_path, r"holds no EWC state: there is no ewc_state\.json")
    refuse(tmp_path / "nowhere", "is not a folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        EWCState.from_pretrained(str(tmp_path / "file"))


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


# The Hub


class FakeHub:
    """A Hub in a folder, with the calls of `huggingface_hub` that the package makes."""

    def __init__(self, root: Path) -> None:
        self.root, self.commits = root, 0

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / repo_id / "0").mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, delete_patterns, **options) -> SimpleNamespace:
        head = self.head(repo_id)
        self.commits += 1
        commit = self.root / repo_id / str(self.commits)
        shutil.copytree(head, commit)
        for path in commit.glob(delete_patterns):
            path.unlink()
        shutil.copytree(folder_path, commit, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{self.commits}")

    def hf_hub_download(self, repo_id, filename, *, revision=None, **options) -> str:
        path = (self.root / repo_id / revision if revision else self.head(repo_id)) / filename
        if not path.is_file():
            raise EntryNotFoundError(f"no {filename}")
        return str(path)

    def head(self, repo_id: str) -> Path:
        return max((self.root / repo_id).iterdir(), key=lambda path: int(path.name))


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda token=None: fake)
    monkeypatch.setattr(hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def test_to_the_hub_and_back(fake_hub):
    assert make(1.0).push_to_hub("ewc-digits") == "https://hub/me/ewc-digits/commit/1"
    assert EWCState.from_pretrained("me/ewc-digits") == make(1.0)
    make(2.0).push_to_hub("me/ewc-digits", private=True, commit_message="Second")
    assert EWCState.from_pretrained("me/ewc-digits") == make(2.0)
    assert EWCState.from_pretrained("me/ewc-digits", revision="1") == make(1.0)
    assert len(files(fake_hub.head("me/ewc-digits"))) == 3


def test_the_model_card(fake_hub):
    make().push_to_hub("me/digits")
    text = (fake_hub.head("me/digits") / "README.md").read_text()
    card = ModelCard(text)
    assert "ewc" in card.data.tags
    assert "| digits \\| 1 | 200 | exact | 0.5 | 2026-11-24T03:00:00+00:00 |" in text
    assert "1,241 parameters in 3 tensors" in text


def test_an_existing_model_card_is_kept(fake_hub):
    fake_hub.create_repo("me/model", private=None, exist_ok=True)
    own = "---\nlicense: mit\ntags:\n- vision\n---\n\n# My model\n\nWords.\n"
    (fake_hub.head("me/model") / "README.md").write_text(own)
    for value in (1.0, 2.0):
        make(value).push_to_hub("me/model")
    text = (fake_hub.head("me/model") / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.tags == ["vision", "ewc"]
    assert card.data.license == "mit"
    assert "# My model\n\nWords." in text
    assert text.count("## Elastic Weight Consolidation") == 1
    assert text.count("| digits") == 2


def test_settings_in_the_section_of_the_card():
    assert "- λ: 1000.0\n" in make().card_section({"λ": 1000.0})


def test_what_the_hub_does_not_have_is_refused(monkeypatch, fake_hub):
    fake_hub.create_repo("me/empty", private=None, exist_ok=True)
    with pytest.raises(ValueError, match=r"'me/empty' is not a folder here.*no ewc_state\.json"):
        EWCState.from_pretrained("me/empty")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'no-one/no-state' is not a folder here"):
        EWCState.from_pretrained("no-one/no-state")


def test_saving_again_repairs_an_altered_file(tmp_path):
    state = make()
    state.save_pretrained(tmp_path)
    content = bytearray(tensor_file(tmp_path).read_bytes())
    content[-1] ^= 1
    tensor_file(tmp_path).write_bytes(content)
    state.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == state


def test_a_copied_checkpoint_keeps_its_state(tmp_path):
    make(1).save_pretrained(tmp_path)
    storage.save_reference(tmp_path, tmp_path / "checkpoint-1")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "best")
    shutil.rmtree(tmp_path / "checkpoint-1")
    make(2).save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path / "best") == make(1)


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
