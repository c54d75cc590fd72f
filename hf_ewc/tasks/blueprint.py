"""A whole model again from one that FSDP2 has sharded, which cannot be prepared a second time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hf_ewc.parameters.names import parameters_by_name, unwrap
from hf_ewc.parameters.sharding import whole


class Blueprint:
    """The architecture of a model, its parameters without values; holds next to no memory.

    Args:
        model: as it is before any wrapper or sharding.
    """

    def __init__(self, model: nn.Module) -> None:
        self._empty = _with_parameters(
            model,
            {
                name: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
                for name, p in model.named_parameters()
            },
        )

    def built_from(self, model: nn.Module) -> nn.Module:
        """A new model with the parameters and buffers of `model`, whole in every process.

        A collective: every process gathers one parameter after another, in the same order.
        """
        parameters = {
            name: nn.Parameter(whole(p.detach()).clone(), p.requires_grad)
            for name, p in parameters_by_name(model).items()
        }
        built = _with_parameters(self._empty, parameters)
        buffers = dict(unwrap(model).named_buffers())
        with torch.no_grad():
            for name, buffer in built.named_buffers():
                buffer.copy_(whole(buffers[name]))
        return built


def _with_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """A copy of `model` with these in place of its parameters; tied ones stay tied."""
    in_place_of = {id(p): parameters[name] for name, p in model.named_parameters()}
    return copy.deepcopy(model, in_place_of)


def check_saves_whole(trainer: Any) -> None:
    """Refuse FSDP settings by which models are saved in parts: a `ValueError`."""
    kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if "FULL" not in kind:
        raise ValueError(
            f"fsdp_state_dict_type is {kind}; run_tasks needs FULL_STATE_DICT, so that each task's "
            "model is saved whole."
        )
