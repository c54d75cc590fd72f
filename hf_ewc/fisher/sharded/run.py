"""The Fisher where each process holds a part of the parameters: all processes in step.

A forward or backward of a module gathers its parameters, which takes all processes. So they run the
same number of batches and of passes, those that have no more run padding, and what one process
meets (an error, a use that is not covered) all of them hear of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ewc.fisher.engine.protocol import UncoveredUse
from hf_ewc.fisher.engine.verification import Comparison, within_rounding
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.run import Plan, ProgressBar, Run
from hf_ewc.fisher.sharded.one_backward import ShardedOneBackward
from hf_ewc.fisher.sharded.together import SameBatchEverywhere
from hf_ewc.fisher.team import Team
from hf_ewc.parameters import sharding


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether some parameter is sharded by FSDP2 or ZeRO-3."""
    return any(sharding.is_sharded(parameter) for parameter in parameters.values())


class ShardedRun(Run):
    """As `Run`, with all processes in step."""

    _engine: ShardedOneBackward | SameBatchEverywhere

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], plan: Plan, team: Team
    ) -> None:
        super().__init__(model, parameters, plan, team)
        self._blank: ExampleBatch | None = None

    def _first_engine(self) -> ShardedOneBackward | SameBatchEverywhere:
        engine = ShardedOneBackward(self._model, self._parameters, self._team)
        if self._plan.fisher_type != "batched":
            return engine
        return self._together(engine.totals(), one_by_one=False)

    def _together(self, totals: dict[str, Tensor], **options: Any) -> SameBatchEverywhere:
        return SameBatchEverywhere(self._model, self._parameters, totals, self._team, **options)

    def _slow_engine(self) -> SameBatchEverywhere:
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
        return within_rounding(
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
        yield distribution.graph_output().sum() * 0.0 if first is None else first
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
