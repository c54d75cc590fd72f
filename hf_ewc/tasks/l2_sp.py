"""L2-SP: every parameter is held to where it began, alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from hf_ewc.config import EWCConfig
from hf_ewc.importance import Fisher
from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.parameters.selection import select_parameters
from hf_ewc.parameters.sharding import whole_shape
from hf_ewc.state.ewc_state import EWCState


def with_l2_sp(
    state: EWCState,
    config: EWCConfig | None,
    model: nn.Module,
    strength: float,
    free: Mapping[str, Sequence[int] | None],
) -> tuple[EWCState, EWCConfig]:
    """State and settings whose penalty is EWC's plus μ/2 ‖θ − θ*‖², θ* the model as it is now.

    Σ λ_i/2 A_i (θ_i − c_i)² + μ/2 Σ (θ_i − θ*_i)² is one quadratic (Li et al. 2018, arXiv
    1802.01483, for the second term; `EWCState.consolidate` for the sum): with λ = 1 and importance
    λ_i A_i + μ.

    Args:
        state: of EWC; the empty one without it.
        config: of EWC; None without it.
        strength: μ.
        free: by name, which rows of a parameter the second term leaves alone, as those of new
            classes; None: all, as of a new head.
    """
    scaled = _with_lambdas(state, config, model) if config is not None and state else EWCState()
    ones = Fisher(
        {
            name: _ones(whole_shape(parameter), free.get(name, ()))
            for name, parameter in parameters_by_name(model, trainable_only=True).items()
            if free.get(name, ()) is not None
        }
    )
    both = scaled.consolidate(ones, model, mode="separate", weight=strength, name="L2-SP")
    settings = replace(
        config or EWCConfig(),
        ewc_lambda=1.0,
        ewc_lambda_growth=1.0,
        ewc_layer_lambdas=None,
        ewc_target_modules=None,
        ewc_exclude_modules=None,
        ewc_mode="separate",
    )
    return both, settings


def _ones(shape: torch.Size, free: Sequence[int] | None) -> torch.Tensor:
    ones = torch.ones(shape)
    if free:
        ones[list(free)] = 0.0
    return ones


def _with_lambdas(state: EWCState, config: EWCConfig, model: nn.Module) -> EWCState:
    """The state times its λ: 0 where the configuration leaves a parameter free."""
    lambdas = config.lambdas(state.importance, state.num_tasks)
    patterns = config.ewc_target_modules, config.ewc_exclude_modules
    if any(patterns):
        chosen = set(select_parameters(model, *patterns, trainable_only=False))
        lambdas = {name: strength if name in chosen else 0.0 for name, strength in lambdas.items()}
    return EWCState(
        {name: lambdas[name] * value for name, value in state.importance.items()},
        dict(state.anchor.items()),
        {name: lambdas[name] * value for name, value in state.offsets.items()},
        state.tasks,
        state.metadata,
    )
