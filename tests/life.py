"""One training run on task B with a state of task A, as a process of its own.

``python -m tests.life FOLDER [--resume] [--kill WHERE]``: trains a tiny model, saves checkpoints
into FOLDER, and writes its final weights to FOLDER/final.safetensors. With ``--kill`` the process
kills itself (SIGKILL) at that place.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training import checkpoints
from hf_ewc.training.trainer import EWCTrainer
from tests.models import Examples, bert, random_quadratic
from tests.training import arguments


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


def kill_at_call(owner: Any, name: str, count: int, before: bool) -> None:
    """Let the ``count``-th call of ``owner.name`` be the process's last act."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == count:
            die()
        result = original(*args, **kwargs)
        if calls == count:
            die()
        return result

    setattr(owner, name, fatal)


def half_written_state(self: Any, path: str) -> None:
    """In place of ``TrainerState.save_to_json``: stops in the middle of the file."""
    Path(path).write_text('{\n  "global_step": 4,\n  "best_metr')
    die()


def arm(where: str) -> None:
    """Prepare the process to be killed at ``where``."""
    from transformers.trainer_callback import TrainerState

    if where == "between files of the state":
        import hf_ewc.files as files

        kill_at_call(files.os, "replace", 1, before=False)
    elif where == "before the reference":
        kill_at_call(checkpoints, "save_reference", 2, before=True)
    elif where == "after the model":
        kill_at_call(Trainer, "save_model", 2, before=False)
    elif where == "after the optimizer":
        kill_at_call(Trainer, "_save_optimizer_and_scheduler", 2, before=False)
    elif where == "in the trainer state":
        original, calls = TrainerState.save_to_json, 0

        def second_is_cut_off(self: Any, path: str) -> None:
            nonlocal calls
            calls += 1
            half_written_state(self, path) if calls == 2 else original(self, path)

        TrainerState.save_to_json = second_is_cut_off  # type: ignore[method-assign]
    elif where == "first checkpoint":
        kill_at_call(Trainer, "save_model", 1, before=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = bert(hidden_dropout_prob=0.1)
    arm(options.kill)
    args = arguments(
        options.folder,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        max_steps=8,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=3,
        lr_scheduler_type="linear",
    )
    # A resumed run gets its state from the checkpoint, where there is one already.
    trainer = EWCTrainer(
        model=model,
        args=args,
        train_dataset=Examples("bert", 20),
        ewc_config=EWCConfig(ewc_lambda=3.0),
        ewc_state=EWCState(*random_quadratic(bert())),
        callbacks=[KillAtStep(5)] if options.kill == "step" else None,
    )
    trainer.train(resume_from_checkpoint=True if options.resume else None)
    save_file(dict(trainer.model.named_parameters()), options.folder / "final.safetensors")


if __name__ == "__main__":
    main()
