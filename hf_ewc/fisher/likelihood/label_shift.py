"""Whether a language model predicts the next label, by its class."""

from __future__ import annotations

from torch import nn
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForTokenClassification,
)


def shifts_labels(model: nn.Module) -> bool | None:
    """Whether a model's class predicts label t + 1 at position t, as causal language models do.

    None for a class whose loss is no cross-entropy at each position, or not known.
    """
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    if loss not in (ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification):
        return None
    config = getattr(model, "config", None)
    return loss is ForCausalLMLoss and not getattr(config, "is_encoder_decoder", False)


def takes_any_length(model: nn.Module) -> bool:
    """Whether this is a causal language model, which takes a part of a text as well."""
    if (shifts := shifts_labels(model)) is not None:
        return shifts
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", None)
    decodes = getattr(config, "is_encoder_decoder", False)
    return not decodes and callable(generates) and bool(generates())
