"""Activation checkpointing while an estimate runs: recomputation sees the same interception."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def checkpointing(model: nn.Module, contexts: Callable[[], Any]) -> Iterator[None]:
    """Keeps gradient checkpointing on in eval mode, always of the non-reentrant kind.

    `transformers` checkpoints in train mode only; without this the estimate would need more memory
    than training does.

    Args:
        contexts: returns the contexts of the first run and of the recomputation.
    """
    layers = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
        and hasattr(module, "_gradient_checkpointing_func")
        and _is_checkpointed_layer(module)
    ]
    wrappers = [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
    functions = [wrapper.checkpoint_fn for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.checkpoint_fn = functools.partial(_checkpoint(contexts))
    originals = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in layers:
        layer.forward = _checkpointed(layer.forward, contexts)
    try:
        yield
    finally:
        for layer, original in originals.items():
            if original is None:
                del layer.forward
            else:
                layer.forward = original
        for wrapper, function in zip(wrappers, functions, strict=True):
            wrapper.checkpoint_fn = function


def _is_checkpointed_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any]) -> Callable[..., Any]:
    return functools.partial(_checkpoint(contexts), forward)


def _checkpoint(contexts: Callable[[], Any]) -> Callable[..., Any]:
    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Bound, so that the second run sees the same tensor objects as the first.
        bound = functools.partial(forward, *args, **kwargs)
        return checkpoint(bound, use_reentrant=False, context_fn=contexts)

    return run
