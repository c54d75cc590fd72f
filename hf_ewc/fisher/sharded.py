"""The Fisher where each process holds a part of the parameters: all processes in step.

A forward or backward of a module gathers its parameters, which takes all processes. So they run the
same number of batches and of passes, those that have no more run padding, and what one process
meets (an error, a use that is not covered) all of them hear of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_ewc import sharding
from hf_ewc.fisher.engine import (
    Comparison,
    Objectives,
    OneBackward,
    UncoveredUse,
    before_capture,
    judged,
    with_last,
)
from hf_ewc.fisher.examples import ExampleBatch
from hf_ewc.fisher.run import Plan, ProgressBar, Run, scores
from hf_ewc.fisher.shards import ShardedLedger
from hf_ewc.fisher.sources import Source
from hf_ewc.fisher.team import Team
from hf_ewc.fisher.untouched import checkpointing


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether some parameter is sharded by FSDP2 or ZeRO-3."""
    return any(sharding.is_sharded(parameter) for parameter in parameters.values())


class ShardedOneBackward(OneBackward):
    """All examples of all processes in one backward, into this process's parts of the sums."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], team: Team
    ) -> None:
        self.ledger = ShardedLedger(model, parameters, team)
        super().__init__(model, parameters, self.ledger)
        self._team = team

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        """Raises `UncoveredUse` in every process, with nothing added, if one has such a use."""
        with self.ledger.watching(), _kept_whole():
            super().add(batch, objectives)

    def _refuse(self, uncovered: list[tuple[str, str]]) -> None:
        if self._team.largest([len(uncovered)])[0]:
            _forget_forward(self._model)
            everywhere = [use for uses in self._team.gather(uncovered) for use in uses]
            super()._refuse(list(dict.fromkeys(everywhere)))


class Together:
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
        team: Team,
        *,
        sign: float = 1.0,
        one_by_one: bool = True,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._totals = totals
        self._team = team
        self._sign = sign
        self._one_by_one = one_by_one
        self._zero3 = [p for p in parameters.values() if sharding.is_zero3(p)]

    def add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        if not self._one_by_one:
            self._add(batch, objectives)
            return
        if len(batch) > 1 and not batch.divisible:
            raise ValueError(
                "This model's Fisher is estimated example by example, but the examples of a batch "
                "cannot be taken apart. Use batch_size=1."
            )
        for n in range(len(batch)):
            self._add(batch.part(n, n + 1), objectives)

    def _add(self, batch: ExampleBatch, objectives: Objectives) -> None:
        def contexts() -> tuple[object, object]:
            return contextlib.nullcontext(), contextlib.nullcontext()

        with checkpointing(self._model, contexts), self._hooks(), _kept_whole():
            for objective, last in with_last(objectives(batch)):
                self._backward(objective, keep=not last)
        sharding.release(self._model)

    def _backward(self, objective: Tensor, *, keep: bool) -> None:
        if not objective.requires_grad:
            return
        if self._zero3:
            torch.autograd.grad(objective, self._zero3, retain_graph=keep, allow_unused=True)
            return
        objective.backward(retain_graph=keep)
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
        elif self._team.rank > 0:
            return  # of a parameter that all hold whole, one process counts
        total, gradient = sharding.local_part(total), sharding.local_part(gradient)
        gradient = gradient.to(total.dtype)
        total.addcmul_(gradient, gradient, value=self._sign)

    def totals(self) -> dict[str, Tensor]:
        return self._totals


class ShardedRun(Run):
    """As `Run`, with all processes in step."""

    _engine: ShardedOneBackward | Together

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], plan: Plan, team: Team
    ) -> None:
        super().__init__(model, parameters, plan, team)
        self._blank: ExampleBatch | None = None

    def _first_engine(self) -> ShardedOneBackward | Together:
        engine = ShardedOneBackward(self._model, self._parameters, self._team)
        if self._plan.fisher_type != "batched":
            return engine
        return self._together(engine.totals(), one_by_one=False)

    def _together(self, totals: dict[str, Tensor], **options: Any) -> Together:
        return Together(self._model, self._parameters, totals, self._team, **options)

    def _slow_engine(self) -> Together:
        return self._together(self._engine.totals())

    def consume(self, source: Source, bar: ProgressBar) -> None:
        try:
            with _without_engine(self._model):
                first = self._first(source)
                source = replace(source, first=lambda: first)
                self._settle_type(source)
                for batch in bar(self._in_step(source)):
                    self._add_in_step(batch)
        finally:
            sharding.release(self._model)

    def _first(self, source: Source) -> ExampleBatch | None:
        """The first batch, or in every process the error that one of them met."""
        first, error = None, None
        try:
            first = source.first()
        except Exception as raised:
            error = raised
        self._team.raise_together(error)
        return first

    def _in_step(self, source: Source) -> Iterator[ExampleBatch | None]:
        """This process's batches, then None for as long as another process has some."""
        first = source.first()
        self._blank = None if first is None else _of_two(first).blank()
        yield from _until_all_are_done(source.batches, self._team)

    def _add_in_step(self, batch: ExampleBatch | None) -> None:
        if self._is_to_verify():
            self._verify_together(batch)
        self._seen += 1
        if isinstance(self._engine, ShardedOneBackward):
            own = self._blank if batch is None else _of_two(batch)
            if own is not None and not self._team.largest([len(own) < 2])[0]:
                self._add(own.to(self._device), batch)
                return
        self._add_everyones(batch)

    def _add(self, batch: ExampleBatch, own: ExampleBatch | None = None) -> None:
        counted = self.num_examples
        try:
            self._engine.add(batch, self._objectives)
        except UncoveredUse as uncovered:
            self.num_examples = counted
            self._fall_back(f"these parameters are used in ways it does not cover: {uncovered}")
            self._add_everyones(own)

    def _add_everyones(self, batch: ExampleBatch | None) -> None:
        """All processes run the batches of all, one after another; the owner counts them."""
        engine = self._engine
        if isinstance(engine, ShardedOneBackward):
            engine = self._together(engine.totals())
        for rank, other in enumerate(self._team.gather(batch)):
            counted = self.num_examples
            if other is not None:
                engine.add(other.to(self._device), self._objectives)
            if rank != self._team.rank:
                self.num_examples = counted

    def _verify_together(self, batch: ExampleBatch | None) -> None:
        """The check of the first batch, on the main process's, by all of them."""
        batch = self._team.gather(batch)[0]
        if batch is not None and len(batch) > 1:
            self._verify(batch.to(self._device))

    def _compare(self, pair: ExampleBatch) -> Comparison:
        if not pair.divisible:
            return Comparison(list(self._parameters), set())
        engine = ShardedOneBackward(self._model, self._parameters, self._team)
        engine.add(pair, self._objectives)
        residuals = engine.totals()
        for residual in residuals.values():
            if isinstance(residual, DTensor):
                residual.to_local().div_(self._team.size)  # every process ran the pair
            elif self._team.rank > 0:
                residual.zero_()
        sizes = self._everywhere(residuals.values())
        self._together(residuals, sign=-1.0).add(pair, self._objectives)
        errors = self._everywhere(residual.abs() for residual in residuals.values())
        return judged(
            self._model,
            self._parameters,
            dict(zip(residuals, sizes, strict=True)),
            dict(zip(residuals, errors, strict=True)),
        )

    def _everywhere(self, tensors: Iterable[Tensor]) -> list[float]:
        locals_ = [sharding.local_part(tensor) for tensor in tensors]
        return self._team.sums([float(t.sum(dtype=torch.float64)) for t in locals_])

    def _objectives(self, batch: ExampleBatch) -> Iterator[Tensor]:
        """As many as the process with the most has: others add passes without a gradient."""
        objective: Tensor | None = None
        for following in _until_all_are_done(super()._objectives(batch), self._team):
            if following is not None:
                objective = following
            elif objective is not None:
                objective = objective * 0.0
            else:
                continue
            yield objective

    def _passes(self, distribution: Any, ids: Any) -> Iterator[Tensor]:
        passes = super()._passes(distribution, ids)
        first = next(passes, None)
        yield scores(distribution).sum() * 0.0 if first is None else first
        yield from passes

    def totals(self) -> dict[str, Tensor]:
        totals = self._engine.totals()
        self._team.add_up({n: t for n, t in totals.items() if not isinstance(t, DTensor)})
        return totals


def _until_all_are_done(stream: Iterator[Any], team: Team) -> Iterator[Any]:
    """The items of `stream`, then None until the streams of all processes are at their ends.

    Raises:
        Exception: what this process's stream has raised.
        RuntimeError: what another process's stream has raised.
    """
    while True:
        item, error = None, None
        try:
            item = next(stream, None)
        except Exception as raised:
            error = raised
        more, failed = team.largest([item is not None, error is not None])
        if failed:
            team.raise_together(error)
        if not more:
            return
        yield item


def _of_two(batch: ExampleBatch) -> ExampleBatch:
    """A batch of one example with its repetition: where the examples lie is seen from two."""
    return batch.twice() if len(batch) == 1 and batch.divisible else batch


def _forget_forward(model: nn.Module) -> None:
    """Let FSDP2 forget a forward that no backward follows."""
    sharding.release(model)
    reset = getattr(model, "reset_iter_state", None)  # torch 2.13 and later
    if callable(reset) and isinstance(model, FSDPModule):
        reset()


@contextlib.contextmanager
def _without_engine(model: nn.Module) -> Iterator[None]:
    """Without what DeepSpeed does for its own backward.

    Its hooks on what ZeRO-3 calls leaf modules, such as experts, make gradients of zero where there
    are none, and reduce them. Its linear map is an autograd function that nothing can look into.
    """
    if not any(sharding.is_zero3(parameter) for parameter in model.parameters()):
        yield
        return
    from deepspeed.utils import z3_leaf_module

    before = [(m, m._backward_hooks) for m in model.modules() if z3_leaf_module(m)]
    for module, hooks in before:
        module._backward_hooks = type(hooks)()
    functional: Any = nn.functional
    linear = functional.linear
    if linear.__name__ == "zero3_linear_wrap":
        functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = linear
        for module, hooks in before:
            module._backward_hooks = hooks


@contextlib.contextmanager
def _kept_whole() -> Iterator[None]:
    """Parameters that ZeRO-3 gathered for a forward stay as they are until its last backward.

    DeepSpeed gathers them anew for the first backward only.
    """

    def pack(tensor: Tensor) -> Tensor:
        return tensor.detach() if sharding.is_zero3(tensor) else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
