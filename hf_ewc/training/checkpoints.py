"""The EWC state beside the Trainer's checkpoints: stored once, referred to by each of them."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from hf_ewc.state.anchor_reference import weight_files
from hf_ewc.state.document import STATE_FILE
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.state.storage import save_reference

logger = logging.getLogger("hf_ewc")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files that the Trainer reads again, of which a copy that broke off leaves a part.
_OF_SAFETENSORS = ("model*.safetensors", "adapter_model*.safetensors")
_OF_TORCH = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("pytorch_model*.bin", "adapter_model*.bin"),
)


def store(state: EWCState, folder: Path, in_checkpoint: bool, write: bool) -> None:
    """Write `state` into `folder`; for a checkpoint, into its parent, and a reference into it.

    Every process has to call it (DTensors are gathered); only those with `write` touch files.
    The Trainer writes `trainer_state.json` last, and so marks a checkpoint as complete. One left
    from an earlier run that is now written over is removed first, and so is its reference.
    """
    if write and in_checkpoint:
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        (folder / STATE_FILE).unlink(missing_ok=True)
    if state:
        state.save_pretrained(folder.parent if in_checkpoint else folder, is_main_process=write)
        if write and in_checkpoint:
            save_reference(folder.parent, folder)
    elif write and not in_checkpoint and (folder / STATE_FILE).exists():
        logger.warning(
            "%s keeps the EWC state of an earlier model: the one that is saved there now has none.",
            folder,
        )


def refer_to_weights(state: EWCState, folder: Path, write: bool) -> None:
    """Let the state in `folder` refer to the weights that lie there now for its anchors.

    After `store`, so that a process which is killed while the weights are written leaves a state
    that is whole by itself. Nothing is done where the weights are no safetensors.
    """
    try:
        if write:
            weight_files(folder)
    except ValueError as error:
        logger.warning("%s The state keeps its own copy.", error)
        write = False
    if state:
        state.save_pretrained(folder, is_main_process=write, checkpoint=folder)


def check_plain(resume: str | bool, output_dir: Path) -> None:
    """Refuse to resume a checkpoint that was trained with EWC without it.

    Raises:
        ValueError: the checkpoint to resume holds an EWC state.
    """
    found = _checkpoints(output_dir)
    folder = (found[-1] if found else None) if resume is True else Path(str(resume))
    if folder is not None and (folder / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} was trained with EWC, and this trainer has neither ewc_config nor "
            "ewc_state, so it would go on without the penalty. Pass the ewc_config of that run."
        )


def checkpoint_to_resume(resume: str | bool, output_dir: Path) -> str | bool | None:
    """The checkpoint that `train(resume_from_checkpoint=resume)` should continue from.

    A process that is killed while it saves leaves half a checkpoint behind. `True` stands for the
    newest whole one; where there are only halves, training starts over (None).

    Raises:
        ValueError: a checkpoint given by its path is not whole.
    """
    if resume is not True:
        if not Path(str(resume)).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {str(resume)!r}, which is no folder here; pass one "
                "that the trainer saved, or True for the newest in output_dir."
            )
        damaged = _damaged(Path(str(resume)))
        if damaged and _CHECKPOINT.fullmatch(Path(str(resume)).name):
            raise ValueError(
                f"{resume} is not a whole checkpoint: {damaged} is missing or cut off, as after a "
                "process that was killed while saving, or a copy that broke off. Pass "
                "resume_from_checkpoint=True to continue from the newest whole one."
            )
        return resume
    newest = newest_whole_checkpoint(output_dir)
    if newest is not None:
        return str(newest)
    if not _checkpoints(output_dir):
        return True  # the Trainer's own error for a folder without checkpoints
    logger.warning("No checkpoint in %s is whole; training starts from the beginning.", output_dir)
    return None


def newest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint in `output_dir` of the latest step that was saved to its end, if any."""
    whole = (folder for folder in reversed(_checkpoints(output_dir)) if is_complete(folder))
    return next(whole, None)


def check_same_everywhere(found: str | bool | None) -> None:
    """Refuse to resume different checkpoints on different processes; every process calls it.

    Raises:
        ValueError: `found`, what this process would resume, is another on another process.
    """
    name = None if found is None else Path(str(found)).name
    names = gather_object([name])
    if len(set(names)) > 1:
        raise ValueError(
            f"The processes would resume different checkpoints, by rank: {names}. Let all of them "
            "see the same output_dir, or copy the checkpoint to resume to every machine."
        )


def is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer finished writing `checkpoint`, and its files are as long as they were."""
    return _damaged(checkpoint) is None


def _damaged(checkpoint: Path) -> str | None:
    """A file of `checkpoint` that is missing or cut off, None if it is whole."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return TRAINER_STATE_NAME
    if not isinstance(state, dict) or "global_step" not in state:
        return TRAINER_STATE_NAME
    of_torch = (path for name in _OF_TORCH for path in checkpoint.glob(name))
    of_safetensors = (path for name in _OF_SAFETENSORS for path in checkpoint.glob(name))
    cut = [path for path in of_torch if path.is_file() and not zipfile.is_zipfile(path)]
    cut += [path for path in of_safetensors if path.is_file() and not _has_its_length(path)]
    return cut[0].name if cut else None


def _has_its_length(path: Path) -> bool:
    """Whether a file of safetensors ends where its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def has_optimizer(checkpoint: Path) -> bool:
    """Whether the state of an optimizer is in `checkpoint`, in any engine's form, with a schedule.

    DeepSpeed keeps both in `global_step*`, FSDP the first in `optimizer_*`.
    """
    if any(checkpoint.glob("global_step*")):
        return True
    optimizers = ("optimizer.pt", "optimizer.bin", "optimizer_[0-9]*")
    found = any(any(checkpoint.glob(name)) for name in optimizers)
    return found and (checkpoint / "scheduler.pt").is_file()


def was_stopped(checkpoint: Path) -> bool:
    """Whether a callback had stopped the training when `checkpoint` was saved."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    control = (state.get("stateful_callbacks") or {}).get("TrainerControl") or {}
    return bool((control.get("args") or {}).get("should_training_stop"))


def stored_state(checkpoint: Path, given: EWCState) -> EWCState:
    """The state that `checkpoint` was trained with; `given` where it refers to none.

    Says so in the log where `given` holds other tasks.
    """
    if not (checkpoint / STATE_FILE).is_file():
        return given
    stored = EWCState.from_pretrained(checkpoint)
    if given and given.tasks != stored.tasks:
        there, here = (_task_names(state) for state in (stored, given))
        logger.warning(
            "%s was trained with an EWC state of %s, with which it goes on; the ewc_state of this "
            "trainer, of %s, is not used. For a new run do not resume.",
            checkpoint,
            there,
            here,
        )
    return stored


def _task_names(state: EWCState) -> str:
    return ", ".join(f"{task.name!r} ({task.date})" for task in state.tasks) or "no task"


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, oldest step first."""
    if not output_dir.is_dir():
        return []
    steps = {
        int(match[1]): folder
        for folder in output_dir.iterdir()
        if folder.is_dir() and (match := _CHECKPOINT.fullmatch(folder.name))
    }
    return [steps[step] for step in sorted(steps)]
