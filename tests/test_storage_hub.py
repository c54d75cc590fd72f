"""States go to the Hub and come back."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from stored import files, make

from hf_ewc import EWCState
from hf_ewc.state import hub

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
