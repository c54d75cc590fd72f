"""Inputs of a batch that a model's loss reads and its outputs do not depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ewc.fisher.labels import LABEL_NAMES, Batch
from hf_ewc.fisher.likelihood.forward import Forward, Outputs, same_scores
from hf_ewc.fisher.memory import is_out_of_memory
from hf_ewc.fisher.unwatched import unwatched

# What forwards of `transformers` take for inputs.
_KNOWN = frozenset(
    (
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("pixel_values", "pixel_mask", "image_grid_thw", "input_values", "input_features"),
        *("decoder_input_ids", "decoder_attention_mask"),
    )
)


def read_by_loss_alone(forward: Forward, batch: Batch) -> list[str]:
    """The inputs that the loss depends on, and the outputs do not."""
    names = [n for n in batch if isinstance(batch[n], Tensor) and n not in LABEL_NAMES]
    unknown = [name for name in names if name not in _KNOWN]
    if not unknown or len(names) == 1:
        return []
    size = len(batch[names[0]])
    few = {name: v[:2] if _has_rows(v, size) else v for name, v in batch.items()}
    with torch.no_grad(), unwatched():
        own = _run(forward, few)
        return [name for name in unknown if _is_of_loss(forward, name, few, own)]


def _is_of_loss(forward: Forward, name: str, batch: Batch, own: Outputs | None) -> bool:
    value = batch[name]
    others = [another(value)]
    if not value.dtype.is_floating_point and not bool(value.any()):  # such as lengths of 0
        others.insert(0, torch.full_like(value, 2))
    found = (_run(forward, {**batch, name: other}) for other in others)
    changed = next((outputs for outputs in found if outputs is not None), None)
    if own is None or own.loss is None or changed is None or changed.loss is None:
        return False
    before, after = float(own.loss), float(changed.loss)
    is_same = abs(after - before) <= 1e-3 * abs(before)  # NaN is not: nothing is left to count
    return same_scores(changed, own) and not is_same


def _run(forward: Forward, batch: Batch) -> Outputs | None:
    """None where the forward fails on what was made up."""
    try:
        return forward.with_labels(batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def another(value: Tensor) -> Tensor:
    """Other numbers of the same shape and dtype."""
    return torch.zeros_like(value) if bool(value.any()) else torch.ones_like(value)


def _has_rows(value: object, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
