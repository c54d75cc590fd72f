"""A state on the Hugging Face Hub: fetching it, uploading it, its section in the model card."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from hf_ewc.state import document, storage
from hf_ewc.state.card import with_section

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder with the files of the state: `source` itself, or where the Hub's were put.

    Raises:
        ValueError: `source` is no folder, and the Hub has no such repository or cannot be reached.
        TypeError: it is no path at all.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"source is {source!r:.60}; needed is the folder of a state, or an id on the Hub."
        )
    if Path(source).is_dir() and str(source):
        return Path(source)
    if not isinstance(source, str) or not _REPO_ID.fullmatch(source) or Path(source).exists():
        raise ValueError(f"{str(source)!r} is not a folder; give one that holds an EWC state.")

    def fetch(name: str, at: str | None) -> Path:
        path = hf_hub_download(source, name, revision=at, token=token, cache_dir=cache_dir)
        return Path(path)

    try:
        folder = fetch(document.STATE_FILE, revision).parent
        # A snapshot's folder is named by its commit: all files come from the same one.
        for name in storage.referred(folder):
            _require_inside(name, str(source))
            fetch(name, folder.name)
        return fetch(storage.tensor_file(folder), folder.name).parent
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{source!r} is not a folder here, and as a repository of the Hub it gave no EWC "
            f"state: {str(error).strip() or type(error).__name__}"
        ) from error


def _require_inside(name: str, source: str) -> None:
    """Refuse files of another place than the repository: a `ValueError`."""
    if ".." in name.split("/"):
        raise ValueError(
            f"The state in {source!r} has its anchor in {name}, outside of the repository. Read it "
            "where it was saved, and put it up with push_to_hub, which puts up a whole one."
        )


def push(
    folder: Path,
    section: str,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Upload the state in `folder` and its section of the model card in one commit; its address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = with_section(present_card(api, repo_id, revision), section)
    (folder / "README.md").write_text(card, encoding="utf-8")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        delete_patterns="ewc_state-*.safetensors",
    )
    return str(commit.commit_url)


def present_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The model card of a repository, None where it has none."""
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")
