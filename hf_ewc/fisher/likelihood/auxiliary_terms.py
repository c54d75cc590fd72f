"""Terms that a model adds to the loss of its labels, weighed in its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

# Of a second head (`auxiliary_loss_weight`), of a router (`router_aux_loss_coef`).
_WEIGHT = re.compile(r"(\w+_)?aux(iliary)?_loss_(weight|coef)")


@contextmanager
def without_auxiliary_terms(model: nn.Module) -> Iterator[None]:
    """Inside the block the loss is that of the outputs alone: the weights of other terms are 0."""
    with ExitStack() as restored:
        for holder in _holders(model):
            for name, value in list(vars(holder).items()):
                if _WEIGHT.fullmatch(name) and isinstance(value, (int, float)) and value:
                    restored.callback(setattr, holder, name, value)
                    setattr(holder, name, 0.0)
        yield


def _holders(model: nn.Module) -> list[Any]:
    """Modules and their configurations, each once."""
    modules = list(model.modules())
    configurations = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    return [*modules, *(c for c in configurations.values() if hasattr(c, "__dict__"))]
