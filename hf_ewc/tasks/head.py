"""What of a model is its head: all that is trained outside the backbone."""

from __future__ import annotations

from torch import nn

from hf_ewc.parameters.adapters import base_model, plain_module
from hf_ewc.parameters.names import class_name, parameters_by_name


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The part of a `PreTrainedModel` that its heads share; None where there is none."""
    inner = base_model(model)
    backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or " ", None)
    return backbone if isinstance(backbone, nn.Module) and backbone is not inner else None


def head_names(model: nn.Module) -> list[str]:
    """The trainable parameters outside the backbone; without one, the last linear layer's.

    Raises:
        ValueError: there are none, as in a language model whose output is its embedding.
    """
    backbone = backbone_of(model)
    if backbone is not None:
        shared = set(map(id, backbone.parameters()))
        inside = [p for p in parameters_by_name(model).values() if id(p) not in shared]
    else:
        linear = [m for m in base_model(model).modules() if isinstance(m, nn.Linear)]
        inside = list(linear[-1].parameters()) if linear else []
    own = set(map(id, inside))
    parameters = parameters_by_name(model, trainable_only=True)
    names = [name for name, p in parameters.items() if id(p) in own]
    if not names:
        raise ValueError(f"{class_name(model)} has no head that is trained apart from the rest.")
    return names


def head_names_in_states(model: nn.Module) -> set[str]:
    """What states may call the head's parameters: as the model does, or one without adapters."""
    names = head_names(model)
    return {*names, *map(plain_module, names)}
