"""A state on the Hugging Face Hub: fetching it, uploading it, its section in the model card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from hf_ewc import storage

CARD_TAG = "ewc"

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BEGIN, _END = "<!-- hf-ewc: begin -->", "<!-- hf-ewc: end -->"


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
    """
    if Path(source).is_dir():
        return Path(source)
    if not isinstance(source, str) or not _REPO_ID.fullmatch(source) or Path(source).exists():
        raise ValueError(f"{str(source)!r} is not a folder; give one that holds an EWC state.")

    def fetch(name: str, at: str | None) -> Path:
        path = hf_hub_download(source, name, revision=at, token=token, cache_dir=cache_dir)
        return Path(path)

    try:
        folder = fetch(storage.STATE_FILE, revision).parent
        # A snapshot's folder is named by its commit: both files come from the same one.
        return fetch(storage.tensor_file(folder), folder.name).parent
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{source!r} is not a folder here, and as a repository of the Hub it gave no EWC "
            f"state: {str(error).strip() or type(error).__name__}"
        ) from error


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
    card = with_section(_present_card(api, repo_id, revision), section)
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


def card_section(tasks: Sequence[Mapping[str, Any]], facts: Mapping[str, object]) -> str:
    """A Markdown section: the facts as a list, the tasks as a table."""
    lines = [
        "## Elastic Weight Consolidation",
        "",
        "This repository holds the state of [EWC](https://arxiv.org/abs/1612.00796), written by",
        "`hf-ewc`: what keeps further fine-tuning from forgetting the tasks below.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    if tasks:
        lines += ["| task | examples | Fisher | weight | consolidated |", "|---|---|---|---|---|"]
        columns = ("name", "num_examples", "fisher_type", "weight", "date")
        for task in tasks:
            cells = [str(task[column]).replace("|", "\\|") for column in columns]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).rstrip() + "\n"


def with_section(card: str | None, section: str) -> str:
    """The model card `card` (None: a new one) with the tag `ewc` and this section, once."""
    marked = f"{_BEGIN}\n{section.strip()}\n{_END}"
    present = ModelCard(card or "---\nlibrary_name: hf-ewc\n---\n", ignore_metadata_errors=True)
    tags = list(present.data.get("tags") or [])
    present.data["tags"] = tags if CARD_TAG in tags else [*tags, CARD_TAG]
    before, begin, rest = present.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin else ""
    parts = [part.strip("\n") for part in (before, marked, after)]
    present.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"
    return str(present)


def _present_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")
