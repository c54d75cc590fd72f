"""Files of a state: exactness, damage, processes that are killed, the Hub."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stored import RECORD, files, make, refuse, tensor_file

from hf_ewc import EWCState, Fisher
from hf_ewc.state import storage


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
