"""Files of a state: exactness, damage, processes that are killed, the Hub."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from hf_ewc import EWCState, Fisher
from hf_ewc.files import sha256
from hf_ewc.state import hub, storage
from hf_ewc.state.ewc_state import TaskRecord
from tests.processes import FORKS

RECORD = TaskRecord("digits | 1", 200, "exact", 0.5, "2026-11-24T03:00:00+00:00")


def make(value: float = 1.0, rows: int = 40) -> EWCState:
    """A state in which every number says which one it is."""
    torch.manual_seed(0)
    names = {"body.weight": (rows, 30), "body.bias": (rows,), "scale": ()}
    return EWCState(
        {name: torch.rand(shape) + value for name, shape in names.items()},
        {name: torch.randn(shape) + value for name, shape in names.items()},
        {"scale": value / 3},
        (RECORD,) * int(value),
        {"value": value, "note": "Übung"},
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


def test_has_state(tmp_path):
    assert not storage.has_state(tmp_path)
    make().save_pretrained(tmp_path)
    assert storage.has_state(tmp_path)


# Damage


def refuse(folder: Path, message: str = "damaged") -> None:
    with pytest.raises(ValueError, match=message):
        EWCState.from_pretrained(folder)


def test_truncated_files_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    for path in (tmp_path / storage.STATE_FILE, tensor_file(tmp_path)):
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
    path = tmp_path / storage.STATE_FILE
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
    path = tmp_path / storage.STATE_FILE
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


@pytest.mark.parametrize("change", ["negative", "nan", "shape", "missing", "file", "task", "kind"])
def test_files_that_are_whole_but_wrong_are_refused(tmp_path, change):
    """As by a program that writes the format, hashes and all, with other content."""
    make().save_pretrained(tmp_path)
    tensors = storage.load_file(tensor_file(tmp_path))
    path = tmp_path / storage.STATE_FILE
    document = json.loads(path.read_text())
    if change == "negative":
        tensors["importance/body.bias"] = -tensors["importance/body.bias"]
    elif change == "nan":
        tensors["anchor/scale"] = torch.tensor(torch.nan)
    elif change == "shape":
        document["parameters"]["scale"]["shape"] = [3]
    elif change == "missing":
        del tensors["anchor/scale"]
    elif change == "task":
        document["tasks"][0]["colour"] = "red"
    elif change == "kind":
        document["parameters"] = ["scale"]
    storage.save_file(tensors, tmp_path / "changed")
    digest = sha256(tmp_path / "changed")
    document["tensors"] = {"file": f"ewc_state-{digest[:16]}.safetensors", "sha256": digest}
    shutil.move(tmp_path / "changed", tmp_path / document["tensors"]["file"])
    if change == "file":
        document["tensors"]["file"] = "../elsewhere.safetensors"
    path.write_bytes(storage._encoded(document))
    refuse(tmp_path, "damaged|nowhere below 0|not finite|was expected")


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
            state.with_metadata().save_pretrained(folder)
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
