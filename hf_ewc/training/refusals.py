"""Set-ups in which EWC cannot be exact, or a state cannot go on."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from hf_ewc.parameters.adapters import has_adapters, space_of
from hf_ewc.parameters.names import unwrap
from hf_ewc.state.ewc_state import EWCState


def check_supported(trainer: Trainer) -> None:
    """Refuse optimizers that step during the backward pass, and flattened parameters.

    Raises:
        ValueError: with all reasons, and what to use instead.
    """
    reasons = [
        *_optimizer_reasons(trainer),
        *_sharding_reasons(trainer),
        *_packing_reasons(trainer),
    ]
    if reasons:
        raise ValueError("EWC cannot be exact with these settings. " + " ".join(reasons))


def _optimizer_reasons(trainer: Trainer) -> list[str]:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    given = _given_optimizer(trainer)
    if name in ("lomo", "adalomo") or given.lower() in ("lomo", "adalomo"):
        return [
            f"The optimizer {given or name!r} updates each parameter during the backward pass, "
            "before the penalty's gradient is there; use optim='adamw_torch', or 'adafactor' "
            "where memory is short."
        ]
    if "layerwise" in name:
        return [
            f"optim={name!r} steps layer by layer during the backward pass, before the penalty's "
            f"gradient is there; use optim={name.replace('_layerwise', '')!r}."
        ]
    if given.startswith("LayerWise"):
        return [
            f"The optimizer {given} steps layer by layer during the backward pass, before the "
            "penalty's gradient is there; use one that steps after it."
        ]
    return []


def _given_optimizer(trainer: Trainer) -> str:
    """Name of the class of the optimizer that was passed to the trainer; "" where none was."""
    if trainer.optimizer is not None:
        return type(trainer.optimizer).__name__
    return (
        str(trainer.optimizer_cls_and_kwargs[0].__name__)
        if trainer.optimizer_cls_and_kwargs
        else ""
    )


def _sharding_reasons(trainer: Trainer) -> list[str]:
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        return ["FSDP on XLA flattens the parameters; use FSDP2 or DDP on other devices."]
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and int(getattr(plugin, "fsdp_version", 1)) == 1:
        return [
            "FSDP version 1 flattens parameters, so importances have no place by name; use FSDP2 "
            "(fsdp_config={'version': 2}, or fsdp_version: 2 in the accelerate configuration)."
        ]
    return []


def _packing_reasons(trainer: Trainer) -> list[str]:
    share = getattr(getattr(trainer, "ewc_config", None), "ewc_keep_fraction", 1.0)
    fsdp, zero = (
        getattr(trainer.accelerator.state, f"{kind}_plugin", None) for kind in ("fsdp", "deepspeed")
    )
    if share < 1.0 and (fsdp is not None or getattr(zero, "zero_stage", 0) == 3):
        return [
            f"ewc_keep_fraction={share:g} picks the largest importances of the whole model, of "
            "which each process holds a part here; use 1.0 with FSDP2 and ZeRO-3, and pack the "
            "saved state: EWCState.from_pretrained(folder).pack(keep_fraction=...)."
        ]
    return []


def check_space(state: EWCState, model: nn.Module, space: str) -> None:
    """Refuse to add a task to a state that holds another space than the configuration asks for.

    Raises:
        ValueError: the state holds the parameters of an adapter and `ewc_space` is "weight", or it
            holds weights of the model and `ewc_space` is "adapter".
    """
    if not state or not has_adapters(model):
        return
    there = space_of(state.importance, model)
    if there != space:
        what = {"adapter": "the adapter's own A and B", "weight": "the model's weights W0 + s B A"}
        raise ValueError(
            f"ewc_space is {space!r}; the state holds {what[there]}, under names like "
            f"{next(iter(state.importance))!r}. Set ewc_space={there!r}, or begin a new state."
        )


def refuse_another_model(trainer: Trainer) -> None:
    """Refuse to train a model that is not the one that would be protected: a `ValueError`."""
    model, init, wrapped = (
        getattr(trainer, name, None) for name in ("model", "model_init", "model_wrapped")
    )
    if init is not None or wrapped is None or model is None or unwrap(wrapped) is unwrap(model):
        return
    there = {id(parameter) for parameter in wrapped.parameters()}
    # Adapters may have been put into the model that the Trainer has.
    if any(p.requires_grad and id(p) not in there for p in model.parameters()):
        raise ValueError(
            "trainer.model was replaced, and a Trainer goes on training the model that it was made "
            "with (trainer.model_wrapped). Make a trainer with the new model, or set model_wrapped "
            "to it as well."
        )
