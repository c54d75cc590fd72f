"""Where a run over tasks keeps what it has learnt and measured."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from hf_ewc.files import sha256, write_atomically
from hf_ewc.tasks.task import Task
from hf_ewc.training.checkpoints import newest_whole_checkpoint

logger = logging.getLogger("hf_ewc")

# Made of the results, after them.
_REPORT = (
    *("report.md", "accuracy_matrix.png", "curves.png", "stability_plasticity.png"),
    *("importance.png", "lambda_search.png"),
)
# Written by the run itself, beside the folders of its tasks.
OWN_FILES = ("results.json", "costs.json", "replay.json", "tracking.json", *_REPORT)
# The state, by the names that it has.
_STATE = ("ewc_state.json", f"ewc_state-{'[0-9a-f]' * 16}.safetensors")
# What trainers, models, states and tokenizers write. Anything else is somebody's, and stays.
_WRITTEN = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("config.json", "training_args.bin", "generation_config.json", "adapter_config.json"),
    *("adapter_model.safetensors", "adapter_model-?????-of-?????.safetensors"),
    *("adapter_model.safetensors.index.json", *_STATE, "heads.safetensors"),
    *("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
    *("rng_state.pth", "rng_state_[0-9]*.pth", "latest", "zero_to_fp32.py"),
    *("pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "preprocessor_config.json"),
    *("processor_config.json", "chat_template.jinja", "spiece.model"),
)
_WEIGHTS = (
    *("model*.safetensors", "adapter_model*.safetensors", "heads.safetensors"),
    *("pytorch_model*.bin", "adapter_model*.bin"),
)
_SAVED = re.compile(r"final|checkpoint-\d+")
_WRITTEN_FOLDERS = ("global_step*", "pytorch_model_fsdp_*", "optimizer_[0-9]*", ".ewc_state-*.tmp")


class RunFolder:
    """The folder of a run: `results.json`, and a folder for each task with its model in `final`.

    Args:
        path: `output_dir` of the training arguments.
        tasks: in the order of training.

    Attributes:
        saved: the files that lay in the folder of each learnt task's model when it was saved, by
            the name of the task's folder; where an earlier version kept none, they are known by
            the names that such files have.
    """

    def __init__(self, path: str | Path, tasks: Sequence[Task]) -> None:
        self.path = Path(path).absolute()  # also where a user's function changes the directory
        self.results = self.path / "results.json"
        self.saved: dict[str, list[str]] = {}
        self._names = [safe_name(task.name) for task in tasks]

    def task(self, index: int) -> Path:
        """What the trainer of this task writes, its checkpoints among them."""
        return self.path / f"{index + 1:02d}-{self._names[index]}"

    def model(self, index: int) -> Path:
        """The model and the EWC state after this task."""
        return self.task(index) / "final"

    def hashes(self, index: int) -> dict[str, str]:
        """SHA-256 of the files of weights after this task; the state's own files say theirs."""
        folder = self.model(index)
        return {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and any(fnmatch(path.name, name) for name in _WEIGHTS)
        }

    def note_saved(self, index: int) -> None:
        """Remember which files are the run's, of those that may be beside a model."""
        folder = self.model(index)
        files = (path for path in folder.rglob("*") if path.is_file())
        self.saved[self.task(index).name] = sorted(p.relative_to(folder).as_posix() for p in files)

    def check_weights(self, index: int, hashes: Mapping[str, str]) -> None:
        """Refuse weights that are not those that were saved after this task: a `ValueError`."""
        folder = self.model(index)
        for name, known in hashes.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing, which the run saved there.")
            if sha256(folder / name) != known:
                raise ValueError(
                    f"{folder / name} is damaged, or another: it is not the file of which "
                    f"{self.results} has the SHA-256 {known[:12]}…, and with other weights the run "
                    "would go on as something else. Put the file back, or begin anew with "
                    "resume=False."
                )

    def check(self) -> None:
        """Refuse a folder with tasks of a run whose results are gone, or links to nowhere.

        Raises:
            ValueError: with what is there, and what to do.
        """
        for index in range(len(self._names)):
            folder = self.task(index)
            if folder.is_symlink() and not folder.exists():
                raise ValueError(f"{folder} is a link to {folder.readlink()}, which is not there.")
        left = [path for path in self._written() if not self.results.exists()]
        if left:
            raise ValueError(
                f"{self.path} has {len(left)} files of an earlier run, such as {left[0]}, but no "
                "results.json that says how far it came. Put that back, choose another output_dir, "
                "or begin anew with resume=False, which removes them."
            )
        refuse_somebodys_report(self.path)

    def refuse_earlier(self, index: int) -> None:
        """Refuse to begin a task on what another run has left in its folder: a `ValueError`."""
        folder = self.task(index)
        left = list(self._written_in(folder)) if folder.is_dir() else []
        if left:
            raise ValueError(
                f"{folder} has {len(left)} files of an earlier run, such as {left[0]}, and the run "
                f"of {self.results} has not begun this task. Move or remove them, or begin anew "
                "with resume=False."
            )

    def has_checkpoint(self, index: int) -> bool:
        """Whether a task that is begun goes on from where it was."""
        return newest_whole_checkpoint(self.task(index)) is not None

    def clear(self) -> None:
        """Remove what an earlier run wrote for these tasks, and say so; all else stays.

        A folder that is a link stays one, and is cleared where it leads to.

        Raises:
            OSError: something could not be removed.
            ValueError: a file of these names is another's than such a run's.
        """
        for path in (self.results, self.path / "replay.json"):
            _refuse_somebodys(path)
        refuse_somebodys_report(self.path)
        self.saved = _saved_by(self.results)
        found = list(self._written())
        if found:
            logger.warning(
                "Begins anew in %s: removes %d files of an earlier run.", self.path, len(found)
            )
        # First the results: without them nothing that is left is taken for a whole run's.
        self.results.unlink(missing_ok=True)
        (self.path / "replay.json").unlink(missing_ok=True)
        _remove(found)
        kept = [str(p) for folder in self._folders() for p in folder.rglob("*") if not p.is_dir()]
        if kept:
            logger.warning("Kept, since no run wrote it: %s.", ", ".join(kept))

    def note_replay(self, index: int, replayed: Mapping[int, Sequence[int]]) -> None:
        """Keep in `replay.json` which examples task `index` replays, by the tasks' numbers from 1.

        Raises:
            ValueError: the task has begun with others, as where the data have changed since.
        """
        path = self.path / "replay.json"
        kept = _replayed(path) if path.exists() and self.task(index).exists() else {}
        now = {str(task + 1): list(indices) for task, indices in replayed.items()}
        if kept.get(str(index + 1), now) != now:
            raise ValueError(
                f"{path} says that task {index + 1} replays other examples than it would now; has "
                "the training data of an earlier task changed? Begin anew with resume=False."
            )
        write_atomically(path, json.dumps({**kept, str(index + 1): now}) + "\n")

    def remove_temporary(self) -> None:
        """Remove what writers that were killed left half done."""
        for name in OWN_FILES:
            for path in self.path.glob(f".{name}.????????"):
                path.unlink(missing_ok=True)

    def remove_model(self, index: int) -> None:
        """Remove the model and the checkpoints of a task that is learnt."""
        if self.task(index).is_dir():
            _remove(list(self._written_in(self.task(index))))

    def _folders(self) -> list[Path]:
        folders = [self.task(index) for index in range(len(self._names))]
        return [folder for folder in folders if folder.is_dir()]

    def _written(self) -> Iterator[Path]:
        for folder in self._folders():
            yield from self._written_in(folder)

    def _written_in(self, folder: Path) -> Iterator[Path]:
        """The files in a task's folder that a run writes, and whole folders of engines' shards."""
        for path in sorted(folder.iterdir()):
            if path.is_dir() and _SAVED.fullmatch(path.name):
                known = self.saved.get(folder.name) if path.name == "final" else None
                yield from (p for p in _saved_in(path) if _is_among(p, path, known))
            elif not path.is_dir() and _is_like(path, _STATE):
                yield path


def refuse_somebodys_report(folder: Path) -> None:
    """Refuse files in the place of a run's in a folder without results: a `ValueError`."""
    found = [name for name in OWN_FILES if (folder / name).exists()]
    if found and not (folder / "results.json").exists():
        raise ValueError(
            f"{folder} has {', '.join(found)} and no results.json, so that no run wrote them, and "
            "a run's own would take their place; move them, or choose another output_dir."
        )


def _refuse_somebodys(path: Path) -> None:
    """Refuse a file that is in the place of a run's and that no such run wrote; damaged ones go."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return
    if path.name == "results.json":
        own = isinstance(found, dict) and "checksum" in found and "methods" not in found
    else:
        own = not found or (isinstance(found, dict) and all(key.isdigit() for key in found))
    if not own:
        raise ValueError(
            f"{path} is of no run by run_tasks, which would have to remove it to begin anew; move "
            "it, or choose another output_dir."
        )


def _replayed(path: Path) -> dict[str, list[int]]:
    """Which examples each task replays: a `ValueError` where that cannot be read."""
    try:
        kept = json.loads(path.read_text())
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict):
        raise ValueError(
            f"{path} is damaged, which says which examples the run replays. Put it back, or begin "
            "anew with resume=False."
        )
    return kept


def _saved_by(results: Path) -> dict[str, list[str]]:
    """What the run of these results noted of its files; nothing where that cannot be read."""
    try:
        found = json.loads(results.read_text()).get("saved") or {}
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_among(path: Path, folder: Path, known: Sequence[str] | None) -> bool:
    """Whether a file, or a folder of files, is one of the known ones of `folder`; None: yes."""
    name = path.relative_to(folder).as_posix()
    return known is None or name in known or any(own.startswith(f"{name}/") for own in known)


def _saved_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _is_part(path):
            yield from _saved_in(path)
        elif _is_like(path, _WRITTEN_FOLDERS if path.is_dir() else _WRITTEN):
            yield path


def _is_part(folder: Path) -> bool:
    """Whether a folder beside a saved model is another adapter, or the state of a head."""
    return folder.name.startswith("head-") or (folder / "adapter_config.json").is_file()


def _is_like(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _remove(paths: Sequence[Path]) -> None:
    """Remove these, and the folders that are empty then; links to folders stay."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    around = {folder for path in paths for folder in (path.parent, *path.parents[1:3])}
    for folder in sorted(around, key=lambda folder: len(folder.parts), reverse=True):
        own = _SAVED.fullmatch(folder.name) or re.match(r"\d\d+-", folder.name)
        if own and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def safe_name(name: str) -> str:
    """The name of a task as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"
