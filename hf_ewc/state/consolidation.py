"""One more task for a state: all checks first, then tensor by tensor, the old ones let go of."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ewc.config.checked import number, share
from hf_ewc.importance import Fisher
from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.adapters import value_of, weights_named
from hf_ewc.parameters.names import canonical_name
from hf_ewc.state.compatibility import misfits, refuse_misfits
from hf_ewc.state.packed import PackedTensor, TensorMap, dense
from hf_ewc.state.packing import SHARDED, Largest, cast_to, state_dtype
from hf_ewc.state.quadratic import MODES, combined, grown

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """How a task is added; for the fields see `EWCState.consolidate`.

    Args:
        ewc_lambda: λ that the task was trained with, for its record.

    Raises:
        ValueError: a value is out of its range.
    """

    mode: str = "online"
    gamma: float = 1.0
    weight: float = 1.0
    dtype: torch.dtype | str = torch.float32
    keep_fraction: float = 1.0
    device: torch.device | str | None = None
    ewc_lambda: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; allowed are {', '.join(map(repr, MODES))}.")
        for name, checked in (
            ("gamma", number("gamma", self.gamma, low=0.0, high=1.0)),
            ("weight", number("weight", self.weight, low=0.0)),
            ("keep_fraction", share("keep_fraction", self.keep_fraction)),
        ):
            object.__setattr__(self, name, checked)
        state_dtype(self.dtype)


class Consolidation:
    """The quadratic of a state and one more Fisher, checked at construction, made by `finish`.

    Neither the state nor the Fisher is held, their tensors are, by name, and each only until its
    successor is there: of what nobody else holds, no more than one tensor is there twice.

    Args:
        importance: A of the state.
        anchor: c of the state.
        offsets: of the state.
        fisher: F of the further task.
        parameters: θ*, of which every name of the state and the Fisher is needed.
        settings: how they are put together.

    Raises:
        ValueError: a name is missing, a shape is another, or the result would not be finite.
    """

    def __init__(
        self,
        importance: TensorMap,
        anchor: TensorMap,
        offsets: Mapping[str, float],
        fisher: Fisher,
        parameters: Parameters,
        settings: Settings,
    ) -> None:
        if not isinstance(fisher, Fisher):
            raise TypeError(f"fisher must be a Fisher, got {type(fisher).__name__}.")
        if not fisher.diagonal:
            raise ValueError("The Fisher has no parameters; estimate it for at least one.")
        self._settings = settings
        self._share = settings.weight / fisher.labels_per_example
        self._fisher = {canonical_name(name): value for name, value in fisher.diagonal.items()}
        self._old = {
            name: (importance.packed(name), anchor.packed(name), offsets[name])
            for name in importance
        }
        self.names = list(dict.fromkeys((*importance, *self._fisher)))
        self._weights = named(parameters, self.names)
        placed = {
            name: weight.base if isinstance(weight, AdaptedWeight) else weight
            for name, weight in self._weights.items()
        }
        shapes = {name: tensor.shape for name, tensor in self._fisher.items()}
        refuse_misfits(
            "The parameters do not fit the state and the Fisher",
            misfits(shapes, placed, "the Fisher", gathers=True)
            + misfits(importance.shapes, placed, "the state", gathers=True),
        )
        if settings.keep_fraction < 1.0 and any(map(sharding.is_sharded, placed.values())):
            raise ValueError(SHARDED)
        refuse_misfits(
            "The importances and anchors would make no state",
            [problem for name in self.names for problem in self._problems(name)],
        )

    def finish(self) -> tuple[TensorMap, TensorMap, dict[str, float]]:
        """Importance, anchor and offsets of the new state."""
        settings, largest = self._settings, None
        if settings.keep_fraction < 1.0:
            largest = Largest(self._importances, settings.keep_fraction)
        importances, anchors, offsets = {}, {}, {}
        for name in self.names:
            importances[name], anchors[name], offsets[name] = self._next(name, largest)
        return TensorMap(importances), TensorMap(anchors), offsets

    def _next(self, name: str, largest: Largest | None) -> tuple[PackedTensor, PackedTensor, float]:
        settings, dtype = self._settings, state_dtype(self._settings.dtype)
        how = settings.mode, settings.gamma, self._share
        total, center, offset = combined(
            self._old.pop(name, None), self._fisher.pop(name, None), self._value(name), *how
        )
        importance, anchor = dense(total), dense(center)
        if largest is not None:
            importance, anchor = largest.take(total, anchor, dtype)
        importance = cast_to(importance, dtype)
        if settings.device is not None and not sharding.is_dtensor(total):
            importance, anchor = importance.to(settings.device), anchor.to(settings.device)
        return importance, anchor, offset

    def _value(self, name: str) -> Tensor:
        return value_of(self._weights[name]).detach()

    def _importance(self, name: str) -> Tensor:
        old, settings = self._old.get(name), self._settings
        return grown(
            None if old is None else old[0],
            self._fisher.get(name),
            self._value(name),
            settings.gamma,
            self._share,
        )

    def _importances(self) -> Iterator[Tensor]:
        return map(self._importance, self.names)

    def _problems(self, name: str) -> list[str]:
        """What would be complex, or not finite, in the new state, one phrase each."""
        value = sharding.local_part(self._value(name))
        if value.is_complex():
            return [f"{name}: the parameter is complex; a state holds real ones"]
        problems = []
        if not math.isfinite(_largest(value)):
            problems.append(f"{name}: the anchor has values that are not finite")
        old, settings = self._old.get(name), self._settings
        bound = 0.0 if old is None else settings.gamma * _largest_of(old[0])
        if name in self._fisher:
            bound += self._share * _largest(sharding.local_part(self._fisher[name]))
        limit = torch.finfo(torch.float32).max
        if bound > limit and not math.isfinite(
            _largest(sharding.local_part(self._importance(name)))
        ):
            problems.append(f"{name}: the importance has values that are not finite")
        return problems


_NEEDED = (
    "needed is the model, a dict by name, or pairs of name and tensor as of "
    "model.named_parameters()"
)


def named(parameters: Parameters, names: Collection[str]) -> Mapping[str, Tensor | AdaptedWeight]:
    """θ by name: of a model, a mapping by name, or pairs of name and tensor.

    Args:
        names: those that are needed; they tell what they mean in a model with adapters.

    Raises:
        TypeError: the names are missing.
    """
    if isinstance(parameters, nn.Module):
        return weights_named(names, parameters)
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters is {parameters!r:.60}, a {type(parameters).__name__}; {_NEEDED}."
        )
    pairs = list(parameters.items() if isinstance(parameters, Mapping) else parameters)
    if not all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in pairs):
        raise TypeError(f"parameters hold a {type(pairs[0]).__name__}; {_NEEDED}.")
    return {canonical_name(name): value for name, value in pairs}


def _largest(values: Tensor) -> float:
    """max |values|; nan or inf where one of them is."""
    if not values.numel():
        return 0.0
    low, high = (bound.item() for bound in values.detach().aminmax())
    return high if math.isnan(high) else max(-low, high)


def _largest_of(packed: PackedTensor) -> float:
    if packed.exponents is not None:
        return _largest(sharding.local_part(packed.kept()))
    return packed.scale * _largest(sharding.local_part(packed.values))
