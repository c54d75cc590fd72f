"""The weights that a model with adapters really has, by the names of the model without them.

A LoRA layer computes with W = W₀ + Σ_k s_k B_k A_k (Hu et al. 2021, arXiv 2106.09685), of which the
model's own parameters are W₀, A and B. Here W is one weight again, whatever rank, initialisation
and number of adapters it is made of, under the name that it has before PEFT wraps the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapted_weight import AdaptedWeight, why_no_weight
from hf_ewc.parameters.names import canonical_name, class_name, parameters_by_name, unwrap
from hf_ewc.parameters.sharding import gathered

_ADAPTER_PARTS = frozenset(
    {"base_model", "base_layer", "modules_to_save", *LoraLayer.adapter_layer_names}
)


def weights_by_name(model: nn.Module) -> dict[str, nn.Parameter | AdaptedWeight]:
    """What the model computes with, by the names that it has without adapters.

    Parameters that no adapter changes stand for themselves: those of `modules_to_save` under the
    name of the module that they replace, all others under the name before PEFT wrapped the model.

    Raises:
        ValueError: an active adapter is no change of weights (prompts, IA³, trained tokens), or it
            changes one of several uses of a tied weight.
    """
    base = base_model(model)
    if getattr(getattr(unwrap(model), "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"The adapter of {class_name(model)} is a prompt, which changes no weight of the model "
            "without it. Use ewc_space='adapter'."
        )
    adapted = dict(_adapted(base))
    _check_tied(model, base, adapted)
    found: dict[str, nn.Parameter | AdaptedWeight] = {}
    for name, parameter in base.named_parameters():
        plain = _plain_name(base, canonical_name(name))
        if plain is not None:
            found[plain] = adapted.get(plain, parameter)
    return found


def _check_tied(model: nn.Module, base: nn.Module, adapted: Mapping[str, AdaptedWeight]) -> None:
    """Refuse an adapter on a weight that the model has in other places, too: a `ValueError`."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        plain = _plain_name(base, canonical_name(name))
        if plain is not None:
            names.setdefault(id(parameter), []).append(plain)
    for name, weight in adapted.items():
        others = [other for other in names.get(id(weight.base), []) if other != name]
        if others:
            raise ValueError(
                f"An adapter changes {name}, which {class_name(model)} ties to "
                f"{', '.join(others)}: its change is of one place alone, or each has its own, and "
                "no one weight stands for all. Use ewc_space='adapter'."
            )


def weights_named(
    names: Iterable[str], model: nn.Module
) -> Mapping[str, nn.Parameter | AdaptedWeight]:
    """What the names of a state can stand for in this model: its parameters, or its weights.

    Names that the model has as it is, adapters included, are those of its own parameters (the space
    of A and B); else they are names of the model without adapters (the space of W).
    """
    if space_of(names, model) == "adapter":
        return parameters_by_name(model)
    return weights_by_name(model)


def space_of(names: Iterable[str], model: nn.Module) -> str:
    """What the names of a state mean in this model: "adapter" (A and B) or "weight" (W).

    Both are one for a model without adapters, which is called "adapter".
    """
    own, wanted = parameters_by_name(model), list(names)
    if not has_adapters(model) or all(name in own for name in wanted):
        return "adapter"
    named_as_wrapped = any(_ADAPTER_PARTS.intersection(name.split(".")) for name in wanted)
    return "adapter" if named_as_wrapped else "weight"


def placed_by_name(names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """As `weights_named`, with W₀ for a weight: it has its shape, and lies as it does."""
    found = weights_named(names, model)
    return {n: w.base if isinstance(w, AdaptedWeight) else w for n, w in found.items()}


def differentiable(weight: nn.Parameter | AdaptedWeight) -> Tensor:
    """The weight with a graph to what is trained."""
    return weight.current() if isinstance(weight, AdaptedWeight) else weight


def value_of(weight: Tensor | AdaptedWeight) -> Tensor:
    """The weight as it is now, detached; in shards where it is so (see `sharding.values`)."""
    if not isinstance(weight, AdaptedWeight):
        return sharding.values(weight)
    with gathered(weight.parameters()):
        value = weight.current().detach()
        return sharding.values_like(sharding.place_like(value, weight.base), weight.base)


def fresh_adapters(model: nn.Module) -> list[str]:
    """The layers whose adapters still are products with B = 0, where the gradient of A is 0."""
    found = []
    for name, layer, adapters in _adapted_layers(base_model(model)):
        factors = [_last_factor(layer, adapter) for adapter in adapters]
        if all(factor is not None and not _is_nonzero(factor) for factor in factors):
            found.append(name)
    return found


def _last_factor(layer: BaseTunerLayer, adapter: str) -> Tensor | None:
    """B of a product B A; None for what is none."""
    if adapter in getattr(layer, "lora_variant", {}):
        return None
    for held in (getattr(layer, "lora_B", {}), getattr(layer, "lora_embedding_B", {})):
        if adapter in held:
            factor: Tensor = getattr(held[adapter], "weight", held[adapter])
            return factor
    return None


def _is_nonzero(factor: Tensor) -> bool:
    return bool(sharding.whole_values(factor).any())


def plain_module(name: str) -> str:
    """The name of a module without adapters; "base_model.model.x.base_layer" is "x"."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:
        i = parts.index("modules_to_save")
        del parts[i : i + 2]
    return ".".join(part for part in parts if part != "base_layer")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model."""
    return any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in model.modules())


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, with the adapters in it."""
    inner = unwrap(model)
    get_base_model = getattr(inner, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else inner
    return base if isinstance(base, nn.Module) else inner


def _adapted(base: nn.Module) -> Iterator[tuple[str, AdaptedWeight]]:
    for name, layer, adapters in _adapted_layers(base):
        inner = layer.get_base_layer()
        _check_kind(name, layer, adapters, inner)
        plain = ".".join(p for p in canonical_name(name).split(".") if p != "base_layer")
        yield f"{plain}.weight", AdaptedWeight(f"{plain}.weight", inner.weight, layer, adapters)


def _adapted_layers(base: nn.Module) -> Iterator[tuple[str, BaseTunerLayer, tuple[str, ...]]]:
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, AuxiliaryTrainingWrapper):
            adapters = _acting(layer)
            if adapters:
                yield name, layer, adapters


def _acting(layer: BaseTunerLayer) -> tuple[str, ...]:
    """The adapters that change what this layer computes now, and are not in its weight already."""
    if layer.disable_adapters or layer.merged:
        return ()
    there = layer._get_available_adapters()
    return tuple(adapter for adapter in layer.active_adapters if adapter in there)


def _check_kind(
    name: str, layer: BaseTunerLayer, adapters: tuple[str, ...], inner: nn.Module
) -> None:
    """Refuse what is no change of a weight: a `ValueError`."""
    for adapter in adapters:
        problem = why_no_weight(layer, adapter)
        if problem:
            raise ValueError(
                f"The adapter {adapter!r} of {name} {problem}, so there is no weight of the model "
                "without it to hold. Use ewc_space='adapter'."
            )
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ValueError(
            f"The weight under the adapter of {name} is quantized ({type(weight).__name__}), and "
            "has no gradient. Use ewc_space='adapter', or load the model in bf16."
        )


def _plain_name(base: nn.Module, name: str) -> str | None:
    """The name without adapters; None for what belongs to an adapter, or is not in use."""
    plain: list[str] = []
    module: Any = base
    parts = iter(name.split("."))
    for part in parts:
        if isinstance(module, ModulesToSaveWrapper):
            used = "original_module" if module.disable_adapters else "modules_to_save"
            if part != used:
                return None
            module = getattr(module, part)
            if part == "modules_to_save":
                adapter = next(parts)
                wrapper_adapters = _wrapper(base, plain).active_adapters
                if adapter not in wrapper_adapters[:1]:
                    return None
                module = module[adapter]
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{'.'.join(plain)} trains single tokens, which is no change of its whole weight. "
                "Use ewc_space='adapter'."
            )
        if isinstance(module, BaseTunerLayer) and part != "base_layer":
            return None
        if part != "base_layer":
            plain.append(part)
        module = getattr(module, part) if not isinstance(module, Mapping) else module[part]
    return ".".join(plain)


def _wrapper(base: nn.Module, parts: list[str]) -> Any:
    return base.get_submodule(".".join(parts))
