"""What a run over tasks does not do with models in shards."""

from __future__ import annotations

from typing import Any

from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.lambda_search import NOT_IN_SHARDS
from hf_ewc.tasks.plan import Plan


def check_shards(trainer: Any, plan: Plan, space: LabelSpace) -> None:
    """Refuse what does not go with the way in which the trainer shares out its model.

    Raises:
        ValueError: with what to use instead.
    """
    if plan.sequence.head_warmup_share and trainer.is_deepspeed_enabled:
        raise ValueError(
            "head_warmup_share does not go with DeepSpeed, whose engine steps within the "
            "backward pass, before gradients can be taken away; use DDP or FSDP2."
        )
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if space.heads is not None:
        raise ValueError("head= does not go with FSDP or DeepSpeed yet; use DDP.")
    if plan.config is not None and plan.config.finds_lambda:
        raise ValueError(NOT_IN_SHARDS)
    if plan.sequence.kl_examples:
        raise ValueError(
            f"kl_examples is {plan.sequence.kl_examples}, which does not go with FSDP or DeepSpeed "
            "yet: the model is run before it is prepared. Use DDP, or leave it at 0."
        )
