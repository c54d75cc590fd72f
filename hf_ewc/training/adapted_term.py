"""The penalty on a weight that adapters change, and its gradient on what that is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapted_weight import AdaptedWeight, LowRank
from hf_ewc.training.gradients import DIRECT, Access
from hf_ewc.training.low_rank import AdaptedPiece, Product, adapted_value_and_gradient, entries


@dataclass(frozen=True)
class AdaptedTerm:
    """One weight W = W₀ + Σ s B A with its importance and anchor, flat and where W₀ lies.

    `strength` is this weight's λ; for `scale` and `index` see `AdaptedPiece`.
    """

    name: str
    weight: AdaptedWeight
    importance: Tensor
    anchor: Tensor
    strength: float
    scale: float = 1.0
    index: Tensor | None = None

    is_matrix = True

    @property
    def parameter(self) -> nn.Parameter:
        """W₀, which lies on the same devices in the same way as the weight."""
        return self.weight.base

    @property
    def is_pulled(self) -> bool:
        """Whether something that the weight is made of gets a gradient from the penalty."""
        return bool(self.trained)

    @property
    def parameters(self) -> list[Tensor]:
        """What the weight is made of."""
        return list(self.weight.parameters())

    @property
    def trained(self) -> list[Tensor]:
        """What gets the gradient."""
        return [p for p in self.parameters if self.strength > 0 and p.requires_grad]

    def is_on(self, weight: object) -> bool:
        """Whether `weight` is made of the same tensors as this one was."""
        return isinstance(weight, AdaptedWeight) and weight.is_same(self.weight)


@torch.no_grad()
def value_and_gradient(
    term: AdaptedTerm, loss_scale: float | None, access: Access = DIRECT
) -> Tensor:
    """λ/2 Σ F (W − c)² over this process's part; with `loss_scale`, gradients are added.

    Under sharding the gradients of A and B are summed over the parts: a collective.

    Args:
        access: how parameters are read and gradients added, where an engine keeps them.
    """
    shares = term.weight.low_rank
    scale = None if term.strength == 0 else loss_scale
    if shares is None:
        return _by_autograd(term, scale, access)
    base = term.parameter
    gradients = [_zeros(share, access) if scale is not None else (None, None) for share in shares]
    own = (
        torch.zeros_like(_local(base), dtype=_wide(base)) if scale and base.requires_grad else None
    )
    products = [
        _product(share, *pair, access) for share, pair in zip(shares, gradients, strict=True)
    ]
    value = adapted_value_and_gradient(_piece(term, products, own), 1.0 if scale is None else scale)
    for share, pair in zip(shares, gradients, strict=True):
        for factor, gradient in zip((share.a, share.b), pair, strict=True):
            if gradient is not None:
                access.add(factor, sharding.summed_over_parts(gradient, base))
    if own is not None:
        access.add_local(base, own)
    return value


def differentiable(term: AdaptedTerm) -> Tensor:
    """λ/2 Σ F (W − c)² with a graph, over the whole weight."""
    theta = sharding.local_part(sharding.place_like(term.weight.current(), term.parameter))
    theta = theta.reshape(-1) if term.index is None else theta.reshape(-1)[term.index]
    anchor, importance = term.anchor.to(theta), term.importance.to(theta)
    value = (0.5 * term.strength * term.scale) * (importance * (theta - anchor) ** 2).sum()
    return sharding.summed_over_parts(value, term.parameter)


@torch.no_grad()
def present_entries(term: AdaptedTerm) -> Tensor:
    """W as it is now, flat, this process's part of it; a new tensor in fp32 or better."""
    shares = term.weight.low_rank
    if shares is None:
        return term.weight.current().reshape(-1)
    return entries(_piece(term, [_product(share, None, None, DIRECT) for share in shares], None))


def _piece(
    term: AdaptedTerm, products: list[Product], base_gradient: Tensor | None
) -> AdaptedPiece:
    base, shape = _local(term.parameter), sharding.whole_shape(term.parameter)
    start = sharding.first_entry(term.parameter)
    held = max(0, min(base.numel(), shape.numel() - start))  # ZeRO-3 pads its last part
    importance, anchor = (
        tensor[:held] if term.index is None else tensor for tensor in (term.importance, term.anchor)
    )
    return AdaptedPiece(
        base[:held],
        importance,
        anchor,
        products,
        shape[1:].numel(),
        start,
        base_gradient,
        term.strength,
        term.scale,
        term.index,
    )


def _local(parameter: Tensor) -> Tensor:
    return sharding.local_part(parameter).detach().reshape(-1)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _zeros(share: LowRank, access: Access) -> tuple[Tensor | None, Tensor | None]:
    """Where the gradients of A and B are summed, whole; None for one that is not trained."""

    def zeros(factor: nn.Parameter) -> Tensor | None:
        if not factor.requires_grad:
            return None
        return torch.zeros(
            sharding.whole_shape(factor), dtype=_wide(factor), device=access.read(factor).device
        )

    return zeros(share.a), zeros(share.b)


def _product(
    share: LowRank, gradient_a: Tensor | None, gradient_b: Tensor | None, access: Access
) -> Product:
    a, b = access.read(share.a), access.read(share.b)
    left, right = share.factors(a, b)
    left_gradient, right_gradient = share.factors(gradient_a, gradient_b)
    return Product(left, right, share.scale, left_gradient, right_gradient)


def _by_autograd(term: AdaptedTerm, loss_scale: float | None, access: Access) -> Tensor:
    """As `value_and_gradient`, through the graph of this one weight, for any kind of adapter."""
    with torch.enable_grad():
        weight = term.weight.current()
    theta = weight.detach().reshape(-1)
    kept = theta if term.index is None else theta[term.index]
    distance = kept - term.anchor.to(theta)
    pull = term.importance.to(theta) * distance
    value = (0.5 * term.strength * term.scale) * torch.dot(pull, distance)
    wanted = [p for p in term.weight.parameters() if p.requires_grad]
    if loss_scale is None or not wanted:
        return value
    pull = pull * (loss_scale * term.strength * term.scale)
    if term.index is not None:
        pull = torch.zeros_like(theta).index_copy_(0, term.index.long(), pull)
    gradients = torch.autograd.grad(weight, wanted, pull.view_as(weight), allow_unused=True)
    for parameter, gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            access.add(parameter, gradient)
    return value
