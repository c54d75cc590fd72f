"""The model that a command is given, by folder or Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

# PEFT's names of tasks, and its classes that load an adapter with its base.
_WITH_ADAPTER = {
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
}


def load_model(name: str) -> nn.Module:
    """The model with its head, as its config names the class; an adapter ready to be trained.

    Raises:
        ValueError: the config names no class, or one that transformers has not.
        OSError: there is no such model.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (Path(name) / "adapter_config.json").is_file():
        return _with_adapter(name)
    config = transformers.AutoConfig.from_pretrained(name)
    (architecture, *_) = config.architectures or [None]
    found: Any = getattr(transformers, architecture or "", None)
    if found is None:
        raise ValueError(
            f"{name} names the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} has not; call hf_ewc.estimate_fisher with the model."
        )
    model, report = found.from_pretrained(name, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{name} lacks the weights {sorted(report['missing_keys'])[:3]} of {architecture}; a "
            "Fisher of weights drawn at random protects nothing."
        )
    return model  # type: ignore[no-any-return]


def _with_adapter(name: str) -> nn.Module:
    task = peft.PeftConfig.from_pretrained(name).task_type
    if task not in _WITH_ADAPTER:
        raise ValueError(f"{name} is an adapter of task type {task}; known are {[*_WITH_ADAPTER]}.")
    model: nn.Module = _WITH_ADAPTER[task].from_pretrained(name, is_trainable=True)
    return model


def pretrained(kind: Any, name: str, **options: Any) -> Any:
    """What `kind.from_pretrained(name)` gives: a model, its configuration or what prepares data.

    Raises:
        ValueError: with the name, and what is wrong, such as a tokenizer that knows no word.
    """
    try:
        found = kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded as a model: {error}") from error
    if isinstance(found, PreTrainedTokenizerBase) and len(found) <= len(found.all_special_ids):
        raise ValueError(
            f"{name} has no vocabulary: what is made of its configuration alone is a "
            f"{type(found).__name__} that knows no word. Put its tokenizer's files beside the "
            "weights, as tokenizer.save_pretrained(folder) does."
        )
    return found
