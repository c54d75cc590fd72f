"""Rows that parameters of a state have gained: admitted, unprotected."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapters import base_model, value_of, weights_named
from hf_ewc.parameters.names import canonical_name, class_name, first_names
from hf_ewc.state import packing
from hf_ewc.state.packed import TensorMap


def with_new_rows(
    importance: TensorMap, anchor: TensorMap, model: nn.Module, names: Iterable[str]
) -> tuple[TensorMap, TensorMap]:
    """Importance and anchor with the new rows of `names`; see `EWCState.grow_rows`."""
    parameters = weights_named(importance, model)
    aliases = {**first_names(base_model(model)), **first_names(model)}
    importances = {name: importance.packed(name) for name in importance}
    anchors = {name: anchor.packed(name) for name in anchor}
    for given in names:
        name = canonical_name(given)
        if name not in importance:
            name = next((n for n in importance if aliases.get(n) == aliases.get(name, name)), name)
        if name not in importance or name not in parameters:
            where = "the state" if name not in importance else class_name(model)
            raise ValueError(f"grow_rows: {given!r} is not a parameter of {where}.")
        theta = sharding.whole(value_of(parameters[name]).detach())
        old, new = importances[name].shape, theta.shape
        if len(old) != len(new) or not old or old[1:] != new[1:] or old[0] > new[0]:
            raise ValueError(
                f"grow_rows: {name!r} is {list(old)} in the state, {list(new)} in the model; "
                "only the number of rows may have grown."
            )
        importances[name] = packing.with_rows(importances[name], torch.zeros_like(theta))
        anchors[name] = packing.with_rows(anchors[name], theta)
    return TensorMap(importances), TensorMap(anchors)
