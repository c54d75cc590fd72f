"""What a model returns, looked at outside of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def logits_of(outputs: Any) -> Tensor | None:
    """The logits of a model's outputs; None where there are none."""
    found: Any = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    found = found[0] if isinstance(found, tuple) and found else found
    return found if isinstance(found, Tensor) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside the block, each module as before after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
