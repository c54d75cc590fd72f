"""The EWC penalty of one state on one model: its value, its gradient, its differentiable form."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.adapters import weights_named
from hf_ewc.parameters.sharding import whole
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.state.packed import PackedTensor, dense
from hf_ewc.training import adapted_term
from hf_ewc.training.adapted_term import AdaptedTerm
from hf_ewc.training.fused import Piece, value_and_gradient
from hf_ewc.training.gradients import gradient_of
from hf_ewc.training.small import SmallTensor, is_small


@dataclass(frozen=True)
class Term:
    """One protected parameter with its importance and anchor, flat and where its values are.

    `strength` is this parameter's λ; for `scale`, `index` and `exponents` see `Piece`.
    """

    name: str
    parameter: Tensor
    importance: Tensor
    anchor: Tensor
    strength: float
    scale: float = 1.0
    index: Tensor | None = None
    exponents: Tensor | None = None

    @property
    def is_pulled(self) -> bool:
        """Whether this parameter gets a gradient from the penalty."""
        return self.strength > 0 and self.parameter.requires_grad

    @property
    def parameters(self) -> list[Tensor]:
        """What the value depends on."""
        return [self.parameter]

    @property
    def trained(self) -> list[Tensor]:
        """What gets the gradient."""
        return [self.parameter] if self.is_pulled else []

    def is_on(self, parameter: object) -> bool:
        """Whether `parameter` is the one that this was made for."""
        return parameter is self.parameter

    @property
    def is_matrix(self) -> bool:
        """Whether this is a weight matrix or more, not a bias or a scale."""
        return len(sharding.whole_shape(self.parameter)) > 1


AnyTerm = Term | AdaptedTerm


class Penalty:
    """λ/2 Σ F (θ − θ*)² + λ·offset, over the parameters that a model has now.

    The objective of Kirkpatrick et al. 2017 (arXiv 1612.00796, equation 3), with a λ per parameter.
    `add_gradients` is meant for once per optimizer step, after the task's backward passes: it
    adds λ F (θ − θ*) to what `.grad` holds, whatever that went through before.

    Of parameters sharded by FSDP2 or ZeRO-3 each process takes its part; values are summed over
    the parts.
    Parameters whose importance is zero everywhere or whose λ is 0 are left alone. Frozen ones count
    in the value and get no gradient; which are frozen is looked at each time.

    Args:
        state: importances, anchors and offsets by parameter name.
        model: the model, wrapped or not; its parameters are looked up here, and kept.
        strengths: λ by parameter name, for every name of the state.
        offload: keep importances and anchors in host memory and move them block by block.

    Attributes:
        terms: what is protected, in the order in which values are returned.
        constant: what does not depend on the parameters: the offsets times λ.

    Raises:
        ValueError: the state does not fit the model.
    """

    def __init__(
        self,
        state: EWCState,
        model: nn.Module,
        strengths: Mapping[str, float],
        offload: bool = False,
    ) -> None:
        sharding.reshard(model)
        state.check(model)
        weights = weights_named(state.importance, model)
        self.terms: list[AnyTerm] = [
            _term(state, name, weights[name], strengths[name], offload)
            for name in state.importance
            if _protects(state.packed(name)[0])
        ]
        self._devices = [term.parameter.device for term in self.terms]
        self._offsets = state.offsets
        self.set_strengths(strengths)

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Take other λ by parameter name, for every name of the state."""
        self.terms = [replace(term, strength=strengths[term.name]) for term in self.terms]
        self._counted = [i for i, term in enumerate(self.terms) if term.strength > 0]
        self._small = _small_tensors(self.terms, self._counted)
        self._groups = _alike(self.terms, (i for i in self._counted if i not in self._small))
        if self._small:
            self._groups.append(list(self._small))
        self.constant = math.fsum(strengths[name] * value for name, value in self._offsets.items())

    @property
    def is_zero(self) -> bool:
        """Whether nothing trainable is protected."""
        return not any(term.is_pulled for term in self.terms)

    def fits(self, model: nn.Module) -> bool:
        """Whether the parameters found at construction are still those of `model`, in place."""
        sharding.reshard(model)
        weights = weights_named([term.name for term in self.terms], model)
        return all(
            term.is_on(weights.get(term.name)) and term.parameter.device == device
            for term, device in zip(self.terms, self._devices, strict=True)
        )

    def values(self) -> Tensor:
        """λ/2 Σ F (θ − θ*)² of each term, [len(terms)], without `constant`; a collective."""
        return self._sweep(None, None)

    def value(self) -> float:
        """λ/2 Σ F (θ − θ*)² + λ·offset as a float; waits for the device."""
        return float(self.values().sum().item()) + self.constant

    def add_gradients(
        self, loss_scale: float = 1.0, members: Container[int] | None = None
    ) -> Tensor:
        """Add `loss_scale` · λ F (θ − θ*) to the gradients; returns `values`.

        A missing gradient counts as zero. Nothing waits for the device.

        Args:
            loss_scale: what the gradients in place are multiplied by.
            members: numbers of the terms whose gradients are meant; None: all.
        """
        return self._sweep(loss_scale, members)

    @torch.no_grad()
    def _sweep(self, loss_scale: float | None, members: Container[int] | None) -> Tensor:
        """Values of all terms, [len(terms)]; with `loss_scale` gradients are added too."""
        parts = []
        for group in self._groups:
            wanted = [(i, loss_scale if members is None or i in members else None) for i in group]
            if group[0] in self._small:
                found = [self._small[i].value_and_gradient(scale) for i, scale in wanted]
                parts.append(torch.tensor(found, dtype=torch.float64))
                continue
            values = _value_and_gradient([(self.terms[i], scale) for i, scale in wanted])
            parts.append(sharding.summed_over_parts(values, self.terms[group[0]].parameter))
        values = _in_order(parts, self._groups)
        if len(self._counted) == len(self.terms):
            return values
        every = values.new_zeros(len(self.terms))
        every[torch.tensor(self._counted, dtype=torch.long)] = values
        return every

    def differentiable(self) -> Tensor:
        """The penalty as a 0-dim tensor with a graph, at the memory of the protected parameters."""
        total = torch.tensor(self.constant, dtype=torch.float32)
        for term in (self.terms[i] for i in self._counted):
            total = total.to(term.parameter.device) + _differentiable(term)
        return total

    @torch.no_grad()
    def relative_distances(self) -> list[tuple[AnyTerm, float]]:
        """‖θ − θ*‖ / ‖θ*‖ over the protected entries of each term that gets a gradient.

        Infinite where an anchor is zero and the parameter is not; a collective.
        """
        terms = [term for term in self.terms if term.is_pulled]
        groups = _alike(terms, range(len(terms)))
        parts = []
        for group in groups:
            squares = _squares([terms[i] for i in group])
            parts.append(sharding.summed_over_parts(squares, terms[group[0]].parameter))
        rows = _in_order(parts, groups).tolist()
        return [(term, _ratio(*row)) for term, row in zip(terms, rows, strict=True)]


def _ratio(square: float, norm: float) -> float:
    return math.sqrt(square / norm) if norm > 0 else (math.inf if square > 0 else 0.0)


def _alike(terms: Sequence[AnyTerm], numbers: Iterable[int]) -> list[list[int]]:
    """The numbers of terms, those together whose parameters lie alike."""
    by_layout: dict[tuple[object, ...], list[int]] = {}
    for i in numbers:
        by_layout.setdefault(sharding.layout(terms[i].parameter), []).append(i)
    return list(by_layout.values())


def _small_tensors(terms: Sequence[AnyTerm], numbers: Iterable[int]) -> dict[int, SmallTensor]:
    """Those of the numbered terms that are small, by their number; they share scratch memory."""
    small = {
        i: term
        for i, term in ((i, terms[i]) for i in numbers)
        if isinstance(term, Term)
        and term.index is None
        and is_small(term.parameter, term.importance, term.anchor)
    }
    scratch = torch.empty(max((term.parameter.numel() for term in small.values()), default=0))
    return {
        i: SmallTensor(t.parameter, t.importance, t.anchor, t.strength * t.scale, scratch)
        for i, t in small.items()
    }


def _in_order(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """Rows of each group's members → in the order of their numbers, on the first one's device."""
    if len(parts) < 2:
        return parts[0] if parts else torch.zeros(0, dtype=torch.float64)
    order = torch.tensor([number for group in groups for number in group])
    rows = torch.cat([part.to(parts[0].device) for part in parts])
    return rows[torch.argsort(order).to(rows.device)]


def _value_and_gradient(terms: Sequence[tuple[AnyTerm, float | None]]) -> Tensor:
    """Values of terms that lie alike, each with its loss scale, or None for no gradient."""
    pieces = [piece(t, scale is not None) for t, scale in terms if isinstance(t, Term)]
    loss_scale = next((scale for _, scale in terms if scale is not None), 1.0)
    fused = value_and_gradient(pieces, loss_scale)
    if len(pieces) == len(terms):
        return fused
    every = fused.new_zeros(len(terms), device=terms[0][0].parameter.device)
    every[[i for i, (term, _) in enumerate(terms) if isinstance(term, Term)]] = fused.to(every)
    for i, (term, scale) in enumerate(terms):
        if isinstance(term, AdaptedTerm):
            every[i] = adapted_term.value_and_gradient(term, scale)
    return every


def _protects(importance: PackedTensor) -> bool:
    if importance.exponents is not None:  # 8 bits know no `any`
        return bool(whole(importance.kept().any()))
    return bool(whole(importance.values.any()))


def _term(
    state: EWCState,
    name: str,
    weight: nn.Parameter | AdaptedWeight,
    strength: float,
    offload: bool,
) -> AnyTerm:
    importance, anchor = state.packed(name)
    parameter = weight.base if isinstance(weight, AdaptedWeight) else weight
    if sharding.is_sharded(parameter):
        held = [sharding.part_like(packed.dense(), parameter) for packed in (importance, anchor)]
        scale, index, exponents = 1.0, None, None
    else:
        if isinstance(weight, AdaptedWeight) and importance.exponents is not None:
            importance = dense(importance.kept())  # which reads no 8 bits
        exponents = importance.exponents
        held = [whole(importance.values), whole(_unscaled(anchor))]
        scale, index = importance.scale, importance.indices
        if index is not None and anchor.indices is None:
            held[1] = held[1].reshape(-1)[index]
        index = None if index is None else index.to(parameter.device)
    own_importance, own_anchor = (_placed(tensor, parameter, offload) for tensor in held)
    if isinstance(weight, AdaptedWeight):
        return AdaptedTerm(name, weight, own_importance, own_anchor, strength, scale, index)
    if exponents is not None:
        exponents = _placed(whole(exponents), parameter, offload)
    return Term(name, weight, own_importance, own_anchor, strength, scale, index, exponents)


def _unscaled(packed: PackedTensor) -> Tensor:
    return packed.kept() if packed.scale != 1.0 else packed.values


def _placed(tensor: Tensor, parameter: Tensor, offload: bool) -> Tensor:
    """`tensor` flat, on the parameter's device or, offloaded, in (pinned) host memory."""
    tensor = tensor.detach().contiguous().view(-1)
    device = sharding.local_part(parameter).device
    if not offload:
        return tensor.to(device)
    tensor = tensor.cpu()
    return tensor.pin_memory() if device.type == "cuda" else tensor


def piece(term: Term, with_gradient: bool) -> Piece:
    """What this process has of `term`; a gradient is left out for parameters that get none."""
    return Piece(
        sharding.local_part(term.parameter).detach().reshape(-1),
        term.importance,
        term.anchor,
        gradient_of(term.parameter) if with_gradient and term.is_pulled else None,
        term.strength,
        term.scale,
        term.index,
        term.exponents,
    )


def _differentiable(term: AnyTerm) -> Tensor:
    if isinstance(term, AdaptedTerm):
        return adapted_term.differentiable(term)
    theta = sharding.local_part(term.parameter).reshape(-1)
    if term.index is not None:
        theta = theta[term.index]
    anchor = term.anchor.to(theta.device).float()
    importance = piece(term, with_gradient=False).wide_importance.to(theta.device).float()
    value = (0.5 * term.strength * term.scale) * (importance * (theta - anchor) ** 2).sum()
    return sharding.summed_over_parts(value, term.parameter)


def _present(term: AnyTerm) -> Tensor:
    """The values now, flat, this process's part of them."""
    if isinstance(term, AdaptedTerm):
        return adapted_term.present_entries(term)
    return sharding.local_part(term.parameter).reshape(-1)


def _squares(terms: Sequence[AnyTerm]) -> Tensor:
    """Σ (θ − θ*)² and Σ θ*² of each term, [len(terms), 2]."""
    rows = []
    for term in terms:
        theta = _present(term)
        anchor = term.anchor.to(theta.device).float()
        theta = (theta if term.index is None else theta[term.index]).float()
        rows.append(torch.stack([(theta - anchor).square().sum(), anchor.square().sum()]))
    return torch.stack(rows)
