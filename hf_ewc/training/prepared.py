"""A trainer that has evaluated before it trains."""

from __future__ import annotations

from typing import Any

from hf_ewc.parameters.names import unwrap


def let_it_be_wrapped(trainer: Any) -> None:
    """Let DDP take in the model at the next `train()`, whatever was evaluated before.

    Evaluation marks the model itself as prepared, and what is so is not wrapped again: each process
    would train on by itself, without a word.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    if trainer.accelerator.num_processes > 1:
        vars(unwrap(trainer.model)).pop("_is_accelerate_prepared", None)
