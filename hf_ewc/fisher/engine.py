"""Squared per-example gradients of a batch: one backward for all examples, or one for each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_ewc.fisher.examples import ExampleBatch
from hf_ewc.fisher.interception import Interception
from hf_ewc.fisher.ledger import Ledger
from hf_ewc.fisher.untouched import checkpointing
from hf_ewc.sharding import whole_shape

# Runs the forward on a batch and yields the objectives to backpropagate, one after another.
Objectives = Callable[[ExampleBatch], Iterator[Tensor]]


class UncoveredUse(Exception):
    """A parameter is used in a way that the one-backward engine does not account for."""


class Engine(Protocol):
    """Adds Σ_n G_n² of a batch to totals by parameter name."""

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None: ...

    def totals(self) -> dict[str, Tensor]: ...


class OneBackward:
    """All examples in one backward, by interception of the forward's operations."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ledger: Ledger | None = None,
    ) -> None:
        self._model = model
        self._ledger = Ledger(parameters) if ledger is None else ledger

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        """Raises `UncoveredUse`, with nothing added, where a use is not accounted for."""
        self._ledger.start(len(batch))
        mode = Interception(self._ledger, batch.inputs, len(batch))

        def contexts() -> tuple[object, object]:
            return contextlib.nullcontext(), mode.recomputation()

        with checkpointing(self._model, contexts):
            stream = objectives(batch)
            with mode:
                objective = next(stream, None)
            if objective is not None:
                self._refuse(mode.uncovered_uses(objective))
            while objective is not None:
                following = next(stream, None)
                self._backward(objective, keep=following is not None)
                objective = following

    def _refuse(self, uncovered: list[tuple[str, str]]) -> None:
        if uncovered:
            raise UncoveredUse(_described(uncovered))

    def _backward(self, objective: Tensor, *, keep: bool) -> None:
        self._ledger.start_pass()
        if objective.requires_grad:
            objective.backward(retain_graph=keep)
        self._ledger.finish_pass()

    def totals(self) -> dict[str, Tensor]:
        return self._ledger.totals()


class OneByOne:
    """Each example in a forward and backward of its own: exact for any model.

    A parameter's gradient is squared and freed as soon as it is complete. Where others wait for
    accumulated gradients too (DeepSpeed reduces them, layer-wise optimizers take their step), none
    are accumulated.

    Args:
        sign: what the squares are multiplied by, −1 to take them off.
        totals: accumulators to add to; new ones if None.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        totals: dict[str, Tensor] | None = None,
        sign: float = 1.0,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._sign = sign
        self._totals = totals if totals is not None else _zeros(parameters)
        self._observed = any(
            getattr(parameter, "_post_accumulate_grad_hooks", None)
            for parameter in parameters.values()
        )

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        if len(batch) > 1 and not batch.divisible:
            shapes = {n: tuple(v.shape) for n, v in batch.inputs.items() if isinstance(v, Tensor)}
            raise ValueError(
                "This model's Fisher is estimated example by example, but the examples of a batch "
                f"cannot be taken apart (tensors {shapes} for {len(batch)} examples). Use "
                "batch_size=1."
            )

        def contexts() -> tuple[object, object]:
            return contextlib.nullcontext(), contextlib.nullcontext()

        with checkpointing(self._model, contexts), self._squaring():
            for n in range(len(batch)):
                for objective, last in with_last(objectives(batch.part(n, n + 1))):
                    self._backward(objective, keep=not last)

    def _backward(self, objective: Tensor, *, keep: bool = False) -> None:
        if not objective.requires_grad:
            return
        if self._observed:
            wanted = list(self._parameters.values())
            torch.autograd.grad(objective, wanted, retain_graph=keep, allow_unused=True)
        else:
            objective.backward(retain_graph=keep)

    @contextlib.contextmanager
    def _squaring(self) -> Iterator[None]:
        hooks = [
            parameter.register_hook(before_capture(partial(self._square, name)))
            if self._observed
            else parameter.register_post_accumulate_grad_hook(self._after_accumulation(name))
            for name, parameter in self._parameters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after_accumulation(self, name: str) -> Callable[[Tensor], None]:
        def square(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._square(name, parameter.grad)
                parameter.grad = None

        return square

    @torch.no_grad()
    def _square(self, name: str, gradient: Tensor) -> None:
        total = self._totals[name]
        gradient = gradient.to(total.dtype)
        total.addcmul_(gradient, gradient, value=self._sign)

    def totals(self) -> dict[str, Tensor]:
        return self._totals


def before_capture(use: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    """A hook that hands a gradient to ``use``, so that autograd has none to keep until the end."""

    def hook(gradient: Tensor) -> Tensor:
        use(gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    return hook


class BatchGradient(OneByOne):
    """The squared gradient of the whole batch: no Fisher, kept to compare with others."""

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        with self._squaring():
            for objective in objectives(batch):
                self._backward(objective)


@dataclass(frozen=True)
class Comparison:
    """What came of comparing the one-backward engine with single examples.

    Args:
        wrong: the parameters on which the two differ.
        proved: those on which they agree and which had a gradient at all.
    """

    wrong: list[str]
    proved: set[str]


def compare(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    pair: ExampleBatch,
    objectives: Objectives,
) -> Comparison:
    """The proof that examples were kept apart, on two of them.

    An axis of another meaning taken for the batch's would mix them.
    """
    if not pair.divisible:
        return Comparison(list(parameters), set())
    engine = OneBackward(model, parameters)
    engine.add(pair, objectives)
    residuals = engine.totals()
    sizes = {name: _sum(total) for name, total in residuals.items()}
    OneByOne(model, parameters, residuals, sign=-1.0).add(pair, objectives)
    errors = {name: _sum(residual.abs()) for name, residual in residuals.items()}
    return judged(model, parameters, sizes, errors)


def judged(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    sizes: Mapping[str, float],
    errors: Mapping[str, float],
) -> Comparison:
    """Tell from rounding what is not.

    Rounding explains a share of a parameter's own sum, and for gradients that are zero in exact
    arithmetic, such as those of attention's key biases, a share of the densest sum around them: in
    half precision of the same module, since the densest of the whole model would hide anything.

    Args:
        sizes: Σ of each parameter's sum of squares by the engine.
        errors: Σ of the absolute differences from single examples.
    """
    half = any(p.element_size() < 4 for p in parameters.values()) or _autocasts(model)
    relative, near, far = (0.3, 1e-3, 1e-6) if half else (1e-3, 0.0, 1e-9)
    numels = {name: max(math.prod(whole_shape(p)), 1) for name, p in parameters.items()}
    densities = {name: sizes[name] / numels[name] for name in parameters}
    densest = max(densities.values(), default=0.0)
    modules: dict[str, float] = {}
    for name, density in densities.items():
        module = name.rpartition(".")[0]
        modules[module] = max(density, modules.get(module, 0.0))
    wrong = [
        name
        for name, error in errors.items()
        if error
        > relative * sizes[name]
        + numels[name] * (near * modules[name.rpartition(".")[0]] + far * densest)
    ]
    seen = {name for name in parameters if sizes[name] > 0 or errors[name] > 0}
    return Comparison(wrong, seen - set(wrong))


def _autocasts(model: nn.Module) -> bool:
    wrapped_by_accelerate = hasattr(model, "_original_forward")
    return wrapped_by_accelerate or any(
        torch.is_autocast_enabled(device) for device in ("cpu", "cuda")
    )


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))


def _zeros(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(
            p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False
        )
        for name, p in parameters.items()
    }


def with_last(stream: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    current = next(stream, None)
    while current is not None:
        following = next(stream, None)
        yield current, following is None
        current = following


def _described(uncovered: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} (in {operation})" for name, operation in uncovered[:5])
    more = f" and {len(uncovered) - 5} more" if len(uncovered) > 5 else ""
    return shown + more
