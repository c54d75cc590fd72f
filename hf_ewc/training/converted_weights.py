"""Weights that a checkpoint holds under other names than the model has them.

`save_pretrained` writes some architectures (ViT, DeiT, Swin, mixtures of experts) in the format
that the Hub has always had for them; `from_pretrained` converts it back. The Trainer's own resume
does not: it leaves such weights as they are, with a warning (transformers issues 43701 and 48805).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ewc.parameters.names import unwrap
from hf_ewc.parameters.sharding import gathered, is_dtensor, is_partitioned


def needs_conversion(model: nn.Module, folder: str | Path) -> bool:
    """Whether `folder` holds weights of `model` under names that it does not have.

    Never so for a model in shards: what FSDP2 and ZeRO-3 write has the model's names.

    Raises:
        ValueError: the file that names the weights is damaged.
    """
    plain = unwrap(model)
    if not isinstance(plain, PreTrainedModel):
        return False
    if any(is_dtensor(p) or is_partitioned(p) for p in plain.parameters()):
        return False
    return not _stored_names(Path(folder)) <= plain.state_dict().keys()


def load_converted(model: nn.Module, folder: str | Path) -> bool:
    """Load the weights in `folder` as `from_pretrained` would, if that is needed.

    Returns:
        Whether it was; if not, nothing is done, since the Trainer's way is right.

    Raises:
        ValueError: weights of the model are not there.
    """
    plain = unwrap(model)
    if not needs_conversion(plain, folder) or not isinstance(plain, PreTrainedModel):
        return False
    with torch.random.fork_rng():
        read: Any = type(plain).from_pretrained(str(folder), output_loading_info=True)
    stored, missing = read[0], read[1]["missing_keys"]
    if missing:
        raise ValueError(
            f"{folder} does not hold the weights of this model: it lacks {len(missing)} of them, "
            f"such as {min(missing)}."
        )
    with gathered(stored.parameters()):  # where ZeRO-3 has partitioned them as they were read
        plain.load_state_dict(stored.state_dict())
    return True


def _stored_names(folder: Path) -> set[str]:
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    path = index if index.is_file() else single
    try:
        if index.is_file():
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return set(file.keys())
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder} does not hold the weights of this model: {path.name} is damaged "
            f"({type(error).__name__}: {error!s:.200})."
        ) from error
    return set()
