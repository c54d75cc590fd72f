"""The ways of not forgetting that stand side by side in the tables."""

from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig, get_peft_model

from hf_ewc import SequenceConfig

ONLY_THE_LAST = SequenceConfig(keep_models="last")


def ways(ewc: Mapping[str, Any], l2sp_lambda: float = 0.1) -> dict[str, dict[str, Any]]:
    """Those for any model; `ewc` has the settings of EWC."""
    return {
        "plain": {},
        "EWC": {**ewc},
        "EWC, λ found": {**ewc, "ewc_lambda": "auto"},
        "L2-SP": {"l2sp_lambda": l2sp_lambda},
        "replay 5 %": {"replay_share": 0.05},
        "EWC + replay 5 %": {**ewc, "replay_share": 0.05},
        "head warm-up": {"head_warmup_share": 0.2},
        "averaging": {"weight_average": "mean"},
        "distillation": {"distillation_weight": 1.0},
        "joint": {"joint_training": True},
    }


def with_lora(make_model: Callable[[], Any], **settings: Any) -> Any:
    """An adapter of a BERT's attention, and a head."""
    adapter = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        **settings,
    )
    return get_peft_model(make_model(), adapter)
