"""One weight that adapters change: W = W₀ + Σ s B A, or what DoRA makes of it.

LoRA: Hu et al. 2021, arXiv 2106.09685; DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_T = TypeVar("_T", Tensor, Tensor | None)
_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
# PEFT's layers whose `get_delta_weight` is what they add to W₀; that of others turns or scales it.
_ADDITIVE = frozenset(
    f"{name}Layer"
    for name in (
        "Lora", "Lycoris", "Vera", "VBLoRA", "RandLora", "FourierFT", "WaveFT", "C3A", "Gralora",
        "Delora", "Shira", "TinyLora", "UniLora",
    )
)  # fmt: skip
# Of these, those that return it transposed where the weight is held as (in, out).
_BY_OUTPUT = frozenset({"FourierFTLayer", "WaveFTLayer"})


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


def why_no_weight(layer: BaseTunerLayer, adapter: str) -> str | None:
    """Why the adapter is no change of the layer's weight, if so."""
    if getattr(layer, "lora_bias", {}).get(adapter, False):
        return "has a bias of its own (lora_bias=True)"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not _is_dora(layer, adapter):
        return f"is a {type(variant).__name__}, which adds nothing to the weight"
    if isinstance(layer, _CONVOLUTIONS) and layer.get_base_layer().groups > 1:
        return "is on a convolution in groups, which PEFT cannot merge"
    kinds = [c.__name__ for c in type(layer).__mro__ if c.__name__.endswith("Layer")]
    turned = bool(getattr(layer, "fan_in_fan_out", False)) and not _BY_OUTPUT.isdisjoint(kinds)
    if _ADDITIVE.isdisjoint(kinds) or turned or not hasattr(layer, "get_delta_weight"):
        return f"is a {kinds[0]}, of which no sum of the weight and what it adds is known here"
    return None


def _flat(factor: _T) -> _T:
    """A factor as a matrix, of a convolution with its kernel in the columns."""
    return factor if factor is None else factor.flatten(1)


def _turned(factor: _T) -> _T:
    return factor if factor is None else factor.flatten(1).T


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
