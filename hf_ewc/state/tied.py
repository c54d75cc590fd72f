"""Which parameters of a state had further names, as tied embeddings have: one tensor, held once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from hf_ewc.parameters.names import first_names


def of_model(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The parameter among `names` that each further name stands for."""
    return {n: first for n, first in first_names(model).items() if n != first and first in names}


def mismatches(recorded: Any, model: nn.Module, names: Collection[str]) -> list[str]:
    """The further names that are parameters of their own now, which no penalty would hold."""
    if not isinstance(recorded, Mapping) or not recorded:
        return []
    now = first_names(model)
    return [
        f"{further}: at consolidation one with {first}, which the state holds; a parameter of its "
        "own now, which it would leave free. Tie them (config.tie_word_embeddings = True, then "
        f"model.tie_weights()), or begin a new state; state.without(['{first}']) gives both up."
        for further, first in recorded.items()
        if first in names and first in now and now.get(further, first) != now[first]
    ]
