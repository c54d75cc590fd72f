"""The weights that a model with adapters really has, by the names of the model without them.

A LoRA layer computes with W = W₀ + Σ_k s_k B_k A_k (Hu et al. 2021, arXiv 2106.09685), of which the
model's own parameters are W₀, A and B. Here W is one weight again, whatever rank, initialisation
and number of adapters it is made of, under the name that it has before PEFT wraps the model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.names import canonical_name, class_name, parameters_by_name, unwrap
from hf_ewc.parameters.sharding import gathered, is_sharded

_T = TypeVar("_T", Tensor, Tensor | None)

_ADAPTER_PARTS = frozenset(
    {"base_model", "base_layer", "modules_to_save", *LoraLayer.adapter_layer_names}
)
_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class LowRank:
    """One adapter's share of a weight: s · L R with L (rows, r) and R (r, columns).

    Args:
        a: A, (r, in), for a convolution (r, in, *kernel).
        b: B, (out, r), for a convolution (out, r, 1, …).
        scale: s.
        transposed: whether the weight is held as (in, out), as GPT-2's and embeddings are: then
            L = Aᵀ and R = Bᵀ, else L = B and R = A.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    transposed: bool = False

    def factors(self, a: _T, b: _T) -> tuple[_T, _T]:
        """L and R as views of `a` and `b`, or of tensors that lie as these do, or None."""
        return (_turned(a), _turned(b)) if self.transposed else (_flat(b), _flat(a))


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight W that adapters change, under the name that it has without them.

    Args:
        name: of the weight in the model without adapters.
        base: W₀, what the layer below the adapters holds.
        layer: PEFT's layer around it.
        adapters: the active ones that this layer has, in the order in which they are added.
    """

    name: str
    base: nn.Parameter
    layer: BaseTunerLayer
    adapters: tuple[str, ...]

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def low_rank(self) -> list[LowRank] | None:
        """The adapters as products of two factors; None where one is something else (DoRA)."""
        found = [_low_rank(self.layer, adapter) for adapter in self.adapters]
        return None if None in found else [share for share in found if share is not None]

    def parameters(self) -> list[nn.Parameter]:
        """What W is made of and can be trained: W₀ and the parameters of the adapters."""
        own = [
            parameter
            for kind in dict.fromkeys(self.layer.adapter_layer_names)  # DoRA stands there twice
            for parameter in _of_adapters(getattr(self.layer, kind), self.adapters)
        ]
        return [self.base, *own]

    @property
    def requires_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def current(self) -> Tensor:
        """W with a graph to what it is made of, in fp32 or better.

        W = W₀ + Σ s B A; with DoRA (Liu et al. 2024, arXiv 2402.09353), where V = W₀ + s B A,
        W = m V / ‖V‖ by output.
        """
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        base = self.base.to(dtype)
        total = base
        for adapter in self.adapters:
            delta = self._delta(adapter).to(base)
            total = total + (
                delta if not _is_dora(self.layer, adapter) else _dora(self, adapter, delta)
            )
        return total

    def _delta(self, adapter: str) -> Tensor:
        share = _low_rank(self.layer, adapter)
        if share is None:
            delta: Tensor = self.layer.get_delta_weight(adapter)
            return delta
        dtype = torch.promote_types(share.a.dtype, torch.float32)
        a, b = share.a.to(dtype), share.b.to(dtype)
        left, right = share.factors(a, b)
        return (share.scale * (left @ right)).view(self.shape)

    def is_same(self, other: AdaptedWeight) -> bool:
        """Whether both are made of the same tensors."""
        mine, others = self.parameters(), other.parameters()
        return len(mine) == len(others) and all(map(operator.is_, mine, others))


def weights_by_name(model: nn.Module) -> dict[str, nn.Parameter | AdaptedWeight]:
    """What the model computes with, by the names that it has without adapters.

    Parameters that no adapter changes stand for themselves: those of `modules_to_save` under the
    name of the module that they replace, all others under the name before PEFT wrapped the model.

    Raises:
        ValueError: an active adapter is no change of weights (prompts, IA³, trained tokens), or it
            changes one of several uses of a tied weight.
    """
    base = base_model(model)
    adapted = dict(_adapted(base))
    found: dict[str, nn.Parameter | AdaptedWeight] = {}
    for name, parameter in base.named_parameters():
        plain = _plain_name(base, canonical_name(name))
        if plain is not None:
            found[plain] = adapted.pop(plain, parameter)
    if adapted:
        raise ValueError(
            f"An adapter changes {', '.join(adapted)}, which {class_name(model)} ties to another "
            "weight that it does not change; no one weight stands for both. Use "
            "ewc_space='adapter'."
        )
    return found


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


@contextmanager
def gradients_of_weights(
    weights: Mapping[str, nn.Parameter | AdaptedWeight],
) -> Iterator[dict[str, nn.Parameter]]:
    """While active, the gradient of each W₀ is taken, and is that of W.

    ∂/∂W₀ = ∂/∂W where W = W₀ + Σ s B A. Where W is something else (DoRA), it takes the place of W₀,
    and its adapters are off; on leaving everything is as it was, to the bit.

    Yields:
        The parameters whose gradients these are, by the names of the weights.

    Raises:
        ValueError: W would have to take the place of a W₀ that is in shards.
    """
    with ExitStack() as stack:
        for weight in weights.values():
            if not isinstance(weight, AdaptedWeight):
                continue
            if weight.low_rank is None:
                stack.enter_context(_in_place_of_base(weight))
            else:
                stack.callback(weight.base.requires_grad_, weight.base.requires_grad)
                weight.base.requires_grad_(True)
        yield {name: _stand_in(weight) for name, weight in weights.items()}


def _stand_in(weight: nn.Parameter | AdaptedWeight) -> nn.Parameter:
    if not isinstance(weight, AdaptedWeight):
        return weight
    parameter: nn.Parameter = weight.layer.get_base_layer().weight
    return parameter


@contextmanager
def _in_place_of_base(weight: AdaptedWeight) -> Iterator[None]:
    if is_sharded(weight.base):
        raise ValueError(
            f"{weight.name} is in shards, and its adapter is no product of two factors (DoRA), so "
            "its Fisher cannot be taken. Use ewc_space='adapter'."
        )
    layer, inner = weight.layer, weight.layer.get_base_layer()
    disabled = layer._disable_adapters
    inner.weight = nn.Parameter(weight.current().detach().to(weight.base.dtype))
    layer._disable_adapters = True
    try:
        yield
    finally:
        inner.weight = weight.base
        layer._disable_adapters = disabled


def fresh_adapters(model: nn.Module) -> list[str]:
    """The layers whose adapters still are products with B = 0, where the gradient of A is 0."""
    return [
        name
        for name, weight in _adapted(base_model(model))
        if weight.low_rank and not any(_is_nonzero(share.b) for share in weight.low_rank)
    ]


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


def _flat(factor: _T) -> _T:
    """A factor as a matrix, of a convolution with its kernel in the columns."""
    return factor if factor is None else factor.flatten(1)


def _turned(factor: _T) -> _T:
    return factor if factor is None else factor.flatten(1).T


def _adapted(base: nn.Module) -> Iterator[tuple[str, AdaptedWeight]]:
    for name, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, AuxiliaryTrainingWrapper):
            continue
        adapters = _acting(layer)
        if not adapters:
            continue
        inner = layer.get_base_layer()
        _check_kind(name, layer, adapters, inner)
        plain = ".".join(p for p in canonical_name(name).split(".") if p != "base_layer")
        yield f"{plain}.weight", AdaptedWeight(f"{plain}.weight", inner.weight, layer, adapters)


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
        problem = _not_a_weight(layer, adapter)
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


def _not_a_weight(layer: BaseTunerLayer, adapter: str) -> str | None:
    """Why the adapter is no change of the layer's weight, if so."""
    if getattr(layer, "lora_bias", {}).get(adapter, False):
        return "has a bias of its own (lora_bias=True)"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not _is_dora(layer, adapter):
        return f"is a {type(variant).__name__}, which adds nothing to the weight"
    if isinstance(layer, _CONVOLUTIONS) and layer.get_base_layer().groups > 1:
        return "is on a convolution in groups, which PEFT cannot merge"
    if not hasattr(layer, "get_delta_weight"):
        return f"is a {type(layer).__name__}, which adds nothing to the weight"
    return None


def _low_rank(layer: BaseTunerLayer, adapter: str) -> LowRank | None:
    if not isinstance(layer, LoraLayer) or adapter in layer.lora_variant:
        return None
    scale = float(layer.scaling[adapter])
    if isinstance(layer, Embedding):
        return LowRank(
            layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], scale, transposed=True
        )
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(layer, Linear):
        return LowRank(a.weight, b.weight, scale, bool(layer.fan_in_fan_out))
    if isinstance(layer, _CONVOLUTIONS):
        return LowRank(a.weight, b.weight, scale)
    return None


def _is_dora(layer: BaseTunerLayer, adapter: str) -> bool:
    return adapter in getattr(layer, "lora_magnitude_vector", {})


def _dora(weight: AdaptedWeight, adapter: str, delta: Tensor) -> Tensor:
    """What DoRA adds to W₀: m V / ‖V‖ − W₀, the norm over all that goes into one output."""
    base = weight.base.to(delta)
    direction = base + delta
    layer: Any = weight.layer
    magnitude = layer.lora_magnitude_vector[adapter].weight.to(delta)
    if getattr(layer, "fan_in_fan_out", False) or isinstance(layer, Embedding):
        norm, magnitude = direction.norm(dim=0, keepdim=True), magnitude.view(1, -1)
    else:
        norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1))
        magnitude = magnitude.view(norm.shape)
    added: Tensor = magnitude / norm * direction - base
    return added


def _of_adapters(held: Any, adapters: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """The parameters in a `ModuleDict` or `ParameterDict` by adapter."""
    if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
        return
    for adapter in adapters:
        if adapter not in held:
            continue
        entry = held[adapter]
        if isinstance(entry, nn.Parameter):
            yield entry
        elif isinstance(entry, nn.Module):
            yield from entry.parameters()


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
