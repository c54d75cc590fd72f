"""Every process runs the same batch, and each squares the part of the gradient it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ewc.fisher.engine.backward import run_backward
from hf_ewc.fisher.engine.checkpointing import checkpointing
from hf_ewc.fisher.engine.one_by_one import before_capture, with_last
from hf_ewc.fisher.engine.protocol import Objectives
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.processes import Processes
from hf_ewc.fisher.sharded.one_backward import kept_whole
from hf_ewc.parameters import sharding


class SameBatchEverywhere:
    """Every process runs the same batch; of its gradient each squares the part that it holds.

    FSDP2 averages gradients over the processes: the average of equal ones is the gradient itself.
    Under ZeRO-3 each process sees the whole gradient, which is not to reach DeepSpeed's hooks.

    Args:
        totals: the sums to add to, in DTensors where the parameters are sharded.
        sign: what the squares are multiplied by.
        one_by_one: whether each example has a backward of its own, else the batch has.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        totals: dict[str, Tensor],
        processes: Processes,
        *,
        sign: float = 1.0,
        one_by_one: bool = True,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._totals = totals
        self._processes = processes
        self._sign = sign
        self._one_by_one = one_by_one
        self._zero3 = [p for p in parameters.values() if sharding.is_zero3(p)]

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        if not self._one_by_one:
            self._add(batch, objectives)
            return
        for n in range(len(batch)):
            self._add(batch.only([n]), objectives)

    def _add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        def contexts() -> tuple[object, object]:
            return contextlib.nullcontext(), contextlib.nullcontext()

        with checkpointing(self._model, contexts), self._hooks(), kept_whole():
            for objective, last in with_last(objectives(batch)):
                self._backward(objective, keep=not last)
        sharding.release(self._model)

    def _backward(self, objective: Tensor, *, keep: bool) -> None:
        if not objective.requires_grad:
            return
        if self._zero3:
            torch.autograd.grad(objective, self._zero3, retain_graph=keep, allow_unused=True)
            return
        run_backward(objective, keep=keep)
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._square(name, gradient)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        hooks = [
            p.register_hook(before_capture(partial(self._square, names[id(p)])))
            for p in self._zero3
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _square(self, name: str, gradient: Tensor) -> None:
        total = self._totals[name]
        if isinstance(total, DTensor):
            if not isinstance(gradient, DTensor):
                gradient = sharding.local_rows(gradient, total)
        elif self._processes.rank > 0:
            return  # of a parameter that all hold whole, one process counts
        total, gradient = sharding.local_part(total), sharding.local_part(gradient)
        gradient = gradient.to(total.dtype)
        total.addcmul_(gradient, gradient, value=self._sign)

    def totals(self) -> dict[str, Tensor]:
        return self._totals
