"""The ways to run a batch where each process holds a part of the parameters: all in step.

A forward or backward of a module gathers its parameters, which takes all processes. So they run the
same number of batches and of passes, those that have no more run padding, and what one process
meets (an error, a use that is not covered) all of them hear of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ewc.fisher.engine.protocol import Objectives
from hf_ewc.fisher.engine.verification import (
    Comparison,
    limits_of_squares,
    require_apart,
    within_rounding,
)
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.examples.sources import Source
from hf_ewc.fisher.examples.structure import structure_of
from hf_ewc.fisher.passes import Passes
from hf_ewc.fisher.processes import Processes
from hf_ewc.fisher.proofs import Mixed, Proofs
from hf_ewc.fisher.sharded.one_backward import ShardedOneBackward
from hf_ewc.fisher.sharded.same_batch import SameBatchEverywhere
from hf_ewc.parameters import sharding
from hf_ewc.precision import wide_sum


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether some parameter is sharded by FSDP2 or ZeRO-3."""
    return any(sharding.is_sharded(parameter) for parameter in parameters.values())


class InStep:
    """As `Replicas`, with all processes in step.

    Args:
        model: the unwrapped model, in eval mode, with sharded parameters.
        parameters: those to estimate the Fisher of, by name.
        processes: those that hold the shards.
        one_by_one: whether the slow way is that of single examples, else that of whole batches.
    """

    alone_may_help = False

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        processes: Processes,
        *,
        one_by_one: bool = True,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._processes = processes
        self._device = next(iter(parameters.values())).device
        self._blank: ExampleBatch | None = None
        self._fast = ShardedOneBackward(model, parameters, processes)
        self._slow = self._everywhere(self._fast.totals(), one_by_one=one_by_one)

    def _everywhere(self, totals: dict[str, Tensor], **options: Any) -> SameBatchEverywhere:
        return SameBatchEverywhere(
            self._model, self._parameters, totals, self._processes, **options
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            with _without_engine(self._model):
                yield
        finally:
            sharding.release(self._model)

    def together(self) -> contextlib.AbstractContextManager[None]:
        return self._processes.together()

    def first(self, source: Source) -> ExampleBatch | None:
        with self._processes.together():
            first = source.first()
        if first is not None:
            self._blank = first.at_least_two().blank()
        return None if first is None else first.to(self._device)

    def batches(self, source: Source) -> Iterator[ExampleBatch | None]:
        """This process's batches, then None for as long as another process has some."""
        for batch in _until_all_are_done(source.batches, self._processes):
            yield None if batch is None else batch.to(self._device)

    def run_fast(self, batch: ExampleBatch | None, passes: Passes, proofs: Proofs) -> None:
        own = self._blank if batch is None else batch.at_least_two()
        unfit = own is None or len(own) < 2 or own.uneven is not None or own.doubtful
        if own is None or self._processes.largest([unfit])[0]:
            self.run_slow(batch, passes)
            return
        self._prove(batch, passes, proofs)
        self._fast.add(own.to(self._device), self._aligned(passes))

    def _prove(self, batch: ExampleBatch | None, passes: Passes, proofs: Proofs) -> None:
        """All processes compare on two examples of each that has a batch of a new structure.

        Raises:
            Mixed: in all processes.
        """
        wanted: tuple[Hashable, ExampleBatch | None] | None = None
        if batch is not None and len(batch) > 1:
            structure = structure_of(batch.inputs, len(batch))
            if proofs.are_due(structure, self._fast.totals()):
                wanted = structure, batch.pair()
        done: set[Hashable] = set()
        for proposal in self._processes.gather(wanted):
            if proposal is None or proposal[1] is None or proposal[0] in done:
                continue
            structure, pair = proposal
            done.add(structure)
            with passes.uncounted(), passes.deciding_once():
                found = self._compare(pair.to(self._device), passes)
            if found.wrong:
                unproved = proofs.unproved(self._fast.totals())
                earlier = self._processes.gather([n for n in found.wrong if n in unproved])
                raise Mixed(found.wrong, sorted({name for names in earlier for name in names}))
            proofs.add(structure, found)

    def run_slow(self, batch: ExampleBatch | None, passes: Passes) -> None:
        """All processes run the batches of all, one after another; the owner counts them."""
        for rank, other in enumerate(self._processes.gather(batch)):
            mine = rank == self._processes.rank
            with contextlib.nullcontext() if mine else passes.uncounted():
                if other is not None:
                    self._run_everywhere(other.to(self._device), passes)

    def _run_everywhere(self, batch: ExampleBatch, passes: Passes) -> None:
        if batch.unconfirmed:
            require_apart(batch, passes.outputs)
            sharding.release(self._model)
        self._slow.add(batch, self._aligned(passes))

    def _compare(self, pair: ExampleBatch, objectives: Objectives) -> Comparison:
        if not pair.divisible:
            return Comparison(list(self._parameters), set())
        aligned = self._aligned(objectives)
        engine = ShardedOneBackward(self._model, self._parameters, self._processes)
        engine.add(pair, aligned)
        residuals = engine.totals()
        for residual in residuals.values():
            if isinstance(residual, DTensor):
                residual.to_local().div_(self._processes.size)  # every process ran the pair
            elif self._processes.rank > 0:
                residual.zero_()
        sizes = self._summed(residuals.values())
        self._everywhere(residuals, sign=-1.0).add(pair, aligned)
        errors = self._summed(residual.abs() for residual in residuals.values())
        return within_rounding(
            self._parameters,
            dict(zip(residuals, sizes, strict=True)),
            dict(zip(residuals, errors, strict=True)),
            limits_of_squares(self._model, self._parameters),
        )

    def _summed(self, tensors: Iterable[Tensor]) -> list[float]:
        shards = [sharding.local_part(tensor) for tensor in tensors]
        return self._processes.sums([float(wide_sum(t)) for t in shards])

    def _aligned(self, objectives: Objectives) -> Objectives:
        """As many as the process with the most has: others add passes without a gradient."""

        def start(batch: ExampleBatch) -> Iterator[Tensor]:
            with self._processes.together():
                own = objectives(batch)
            return aligned(own)

        def aligned(own: Iterator[Tensor]) -> Iterator[Tensor]:
            objective: Tensor | None = None
            for following in _until_all_are_done(own, self._processes):
                if following is not None:
                    objective = following
                elif objective is not None:
                    objective = objective * 0.0
                else:
                    continue
                yield objective

        return start

    def undo(self) -> bool:
        return False

    def begin_again(self) -> None:
        raise NotImplementedError("processes in step do not begin again each for itself")

    def totals(self) -> dict[str, Tensor]:
        totals = self._fast.totals()
        self._processes.add_up({n: t for n, t in totals.items() if not isinstance(t, DTensor)})
        return totals


def _until_all_are_done(stream: Iterator[Any], processes: Processes) -> Iterator[Any]:
    """The items of `stream`, then None until the streams of all processes are at their ends.

    Raises:
        Exception: what this process's stream has raised.
        RuntimeError: what another process's stream has raised.
    """
    while True:
        with processes.together():
            item = next(stream, None)
        if not processes.largest([item is not None])[0]:
            return
        yield item


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
