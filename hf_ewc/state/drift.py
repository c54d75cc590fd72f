"""How far a model has moved from a state's anchor, in the state's own unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_ewc.parameters.adapters import differentiable, weights_named
from hf_ewc.state.quadratic import half_square

if TYPE_CHECKING:
    from hf_ewc.state.ewc_state import EWCState


@torch.no_grad()
def squared_drift(state: EWCState, model: nn.Module) -> dict[str, float]:
    """Σ_{i in a parameter} A_i (θ_i − c_i)² by the parameter's name, without λ.

    Half of it is about the Kullback-Leibler divergence of the model from what it was, in nats a
    label of the old tasks. Under FSDP2 every process has to call it, and each gets the whole sums.
    """
    parameters = weights_named(state.importance, model)
    return {
        name: 2.0 * half_square(*state.packed(name), differentiable(parameters[name])).item()
        for name in state.importance
    }
