"""The beginning and the end of each run of a trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback


@contextlib.contextmanager
def none_beyond_the_last_step(trainer: Any, stopped: bool = False) -> Iterator[None]:
    """Inside the block the trainer begins no epoch when it has taken all its steps.

    A Trainer looks whether it is done after a step alone: from the checkpoint of a last step in the
    middle of an epoch (`max_steps`) it would take one more.

    Args:
        stopped: begin none at all, as a callback has ended the training that is gone on with.
    """
    run_epoch = getattr(trainer, "_run_epoch", None)  # of transformers 5
    if run_epoch is None:
        yield
        return

    def run_epoch_if_due(*args: Any, **kwargs: Any) -> Any:
        if stopped or 0 < trainer.state.max_steps <= trainer.state.global_step:
            trainer.control.should_training_stop = True
            return None
        return run_epoch(*args, **kwargs)

    own = vars(trainer).get("_run_epoch")
    trainer._run_epoch = run_epoch_if_due
    try:
        yield
    finally:
        if own is None:
            del trainer._run_epoch
        else:
            trainer._run_epoch = own


class RunBegins(TrainerCallback):
    """Tells the trainer of each run, also where `auto_find_batch_size` starts over."""

    def __init__(self, expect_run: Callable[[], None]) -> None:
        self._expect_run = expect_run

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._expect_run()
