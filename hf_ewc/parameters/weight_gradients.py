"""The Fisher of weights under adapters: their gradients, without merging anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.sharding import is_sharded


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
