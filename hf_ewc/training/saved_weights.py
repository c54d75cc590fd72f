"""Weights that a trainer saved, back in a model, without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ewc.parameters.names import unwrap
from hf_ewc.training.converted_weights import load_converted


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load what a trainer's `save_model` wrote, whole, into a model that is in no shards yet.

    Raises:
        ValueError: the folder has no weights, or not those of this model.
    """
    plain, folder = unwrap(model), Path(folder)
    if load_converted(plain, folder):
        return
    try:
        if hasattr(plain, "peft_config"):
            _load_adapters(plain, folder)
        elif (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            load_sharded_checkpoint(plain, str(folder), prefer_safe=True)
        else:
            load_model(plain, folder / SAFE_WEIGHTS_NAME)
    except (OSError, RuntimeError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} does not hold the weights of this model: {error}") from error


def _load_adapters(model: Any, folder: Path) -> None:
    """The adapters of a PEFT model: "default" lies in the folder, others in one of their name."""
    for name in model.peft_config:
        own = folder if name == "default" else folder / name
        if own.is_dir():
            model.load_adapter(str(own), name, is_trainable=name in model.active_adapters)
