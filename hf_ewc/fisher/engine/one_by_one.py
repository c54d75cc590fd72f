"""Each example in a forward and backward of its own: slow, and exact for any model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hf_ewc.fisher.engine.backward import run_backward
from hf_ewc.fisher.engine.checkpointing import checkpointing
from hf_ewc.fisher.engine.lookups import RowsOnly, is_rows_only
from hf_ewc.fisher.engine.protocol import Objectives
from hf_ewc.fisher.examples.batch import ExampleBatch


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
        def contexts() -> tuple[object, object]:
            return contextlib.nullcontext(), contextlib.nullcontext()

        wanted = () if self._observed else self._parameters.values()
        with checkpointing(self._model, contexts), self._squaring(), RowsOnly(wanted):
            for n in range(len(batch)):
                for objective, last in with_last(objectives(batch.only([n]))):
                    self._backward(objective, keep=not last)

    def _backward(self, objective: Tensor, *, keep: bool = False) -> None:
        if not objective.requires_grad:
            return
        if self._observed:
            wanted = list(self._parameters.values())
            torch.autograd.grad(objective, wanted, retain_graph=keep, allow_unused=True)
        else:
            run_backward(objective, keep=keep)

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
        if is_rows_only(gradient):
            rows = gradient.coalesce()
            squares = rows.values().to(total.dtype).square()
            total.index_add_(0, rows.indices()[0], squares, alpha=self._sign)
            return
        gradient = dense(gradient).to(total.dtype)
        total.addcmul_(gradient, gradient, value=self._sign)

    def totals(self) -> dict[str, Tensor]:
        return self._totals


def before_capture(use: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    """A hook that hands a gradient to `use`, so that autograd has none to keep until the end."""

    def hook(gradient: Tensor) -> Tensor:
        use(dense(gradient))
        if gradient.layout == torch.sparse_coo:
            return torch.zeros_like(gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    return hook


def dense(gradient: Tensor) -> Tensor:
    """Written out, where it holds the rows of an embedding that were looked up alone."""
    return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient


class BatchGradient(OneByOne):
    """The squared gradient of the whole batch: no Fisher, kept to compare with others."""

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        with self._squaring():
            for objective in objectives(batch):
                self._backward(objective)


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
