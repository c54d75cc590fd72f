"""A run that was saved at its last step takes no further one when it goes on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def none_beyond_the_last_step(trainer: Any) -> Iterator[None]:
    """Inside the block the trainer begins no epoch when it has taken all its steps.

    A Trainer looks whether it is done after a step alone: from the checkpoint of a last step in the
    middle of an epoch (`max_steps`) it would take one more.
    """
    run_epoch = getattr(trainer, "_run_epoch", None)  # of transformers 5
    if run_epoch is None:
        yield
        return

    def run_epoch_if_due(*args: Any, **kwargs: Any) -> Any:
        if 0 < trainer.state.max_steps <= trainer.state.global_step:
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
