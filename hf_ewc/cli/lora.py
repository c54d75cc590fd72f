"""The options of a script that trains LoRA in place of all weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model

from hf_ewc.config.checked import integer, number, refuse
from hf_ewc.tasks.class_mask import classification_heads


@dataclass
class LoraArguments:
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA in place of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(
        default=16.0, metadata={"help": "Scale of LoRA: what it adds is times this / rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "The modules with LoRA: suffixes of their names, or all-linear."},
    )


def with_lora(model: Any, given: LoraArguments, task_type: str | None = None) -> Any:
    """The model, under adapters where `use_peft` asks for them.

    Args:
        model: on which they are put.
        given: what was asked for.
        task_type: PEFT's name for what the model is for, such as "SEQ_CLS"; without one, as for
            images, it classifies, and its head is trained as a whole.

    Raises:
        ValueError: there are no such modules, or a number that cannot be meant.
    """
    if not given.use_peft:
        return model
    integer("lora_r", given.lora_r, low=1)
    number("lora_alpha", given.lora_alpha, low=0.0, open_low=True)
    if not 0 <= given.lora_dropout < 1:
        refuse("lora_dropout", given.lora_dropout, "a number of at least 0 and below 1")
    targets = given.lora_target_modules
    heads = classification_heads(model) if task_type is None else []
    names = [name for name, module in model.named_modules() if any(module is h for h in heads)]
    config = LoraConfig(
        task_type=task_type,
        r=given.lora_r,
        lora_alpha=given.lora_alpha,
        lora_dropout=given.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=names or None,
        modules_to_save=names or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora_target_modules is {targets}: {error}") from error
