"""Names of parameters: those of the unwrapped model, and which of them a pattern selects."""

from __future__ import annotations

import sys

from torch import nn

_WRAPPER_PARTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DDP, FSDP1 and DeepSpeed wrappers.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def _inner(model: nn.Module) -> nn.Module | None:
    # Compiled whole, the original is a submodule; compiled in regions, it is an attribute.
    original = model._modules.get("_orig_mod") or model.__dict__.get("_orig_mod")
    if isinstance(original, nn.Module):
        return original
    if isinstance(model, _wrapper_types()):
        return model.get_submodule("module")
    return None


def _wrapper_types() -> tuple[type, ...]:
    types: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    # Looked up, not imported: a model can be wrapped by them only if they are loaded already.
    for module, name in (
        ("torch.distributed.fsdp", "FullyShardedDataParallel"),
        ("deepspeed", "DeepSpeedEngine"),
    ):
        wrapper = getattr(sys.modules.get(module), name, None)
        if isinstance(wrapper, type):
            types += (wrapper,)
    return types


def class_name(model: nn.Module) -> str:
    """The name of the model's own class, inside wrappers and adapters, sharded by FSDP2 or not."""
    inner = unwrap(model)
    get_base_model = getattr(inner, "get_base_model", None)  # of a PEFT model
    cls = type(get_base_model() if callable(get_base_model) else inner)
    # FSDP2 gives each module that it shards a new class, with the module's own as the last base.
    while any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        cls = cls.__bases__[-1]
    return cls.__name__


def canonical_name(name: str) -> str:
    """`name` without the parts that `torch.compile`, FSDP and activation checkpointing put in."""
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    return name


def parameters_by_name(model: nn.Module, trainable_only: bool = False) -> dict[str, nn.Parameter]:
    """The parameters by their names in the unwrapped model, tied ones once, under the first name.

    Args:
        model: a module, wrapped or not.
        trainable_only: leave out the parameters that do not require a gradient.
    """
    return {
        canonical_name(name): parameter
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad or not trainable_only
    }


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, and the one that `parameters_by_name` has for it.

    They differ for tied parameters, which have several.
    """
    named = list(unwrap(model).named_parameters(remove_duplicate=False))
    firsts: dict[int, str] = {}
    for name, parameter in named:
        firsts.setdefault(id(parameter), canonical_name(name))
    return {canonical_name(name): firsts[id(parameter)] for name, parameter in named}
