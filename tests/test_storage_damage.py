"""Files of states that are damaged, or no files of states, are refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from stored import make, refuse, tensor_file

from hf_ewc import EWCState
from hf_ewc.files import sha256
from hf_ewc.state import document, storage
from hf_ewc.state.document import STATE_FILE, encoded
from tests.processes import FORKS


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
    "a shape beyond any tensor": set_to("parameters", "scale", "shape", [2**40]),
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
    "examples of 400 digits": set_to("tasks", 0, "num_examples", 10**400),
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


DEEP = {}
for _ in range(300):
    DEEP = {"a": [DEEP]}
HEAD = {"parameters": ["scale"], "labels": None, "hashes": None}
FINGERPRINTS = {
    "a list": [],
    "a head in words": {"head": "scale"},
    "a head without labels": {"head": {"parameters": ["scale"]}},
    "a head of no parameter": {"head": {**HEAD, "parameters": []}},
    "a head of numbers": {"head": {**HEAD, "parameters": [1]}},
    "labels that are a number": {"head": {**HEAD, "labels": 5}},
    "hashes of numbers": {"head": {**HEAD, "hashes": [1, 2]}},
    "adapters in a list": {"adapters": ["LORA"]},
    "an adapter that is a number": {"adapters": {"default": 8}},
    "tied in a list": {"tied": ["scale"]},
    "free in words": {"free": "scale"},
    "a base in a list": {"base": []},
    "a sample without hashes": {"base": {"scale": {"shape": [1]}}},
    "a sample of a shape in words": {"base": {"scale": {"shape": ["1"], "hashes": []}}},
    "a model that is a number": {"model": 1},
}


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_fingerprints_that_no_model_has_are_refused(tmp_path, kind):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, change=set_to("metadata", {"fingerprint": FINGERPRINTS[kind]}))
    with pytest.raises(ValueError, match="fingerprint"):
        EWCState.from_pretrained(tmp_path)
    rewrite(tmp_path, change=set_to("metadata", {"fingerprint": {"model": "Own", "head": HEAD}}))
    EWCState.from_pretrained(tmp_path)


def test_objects_in_objects_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, change=set_to("metadata", DEEP))
    with pytest.raises(ValueError, match="objects deep"):
        EWCState.from_pretrained(tmp_path)
