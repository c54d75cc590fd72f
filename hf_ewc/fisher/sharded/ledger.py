"""Sums of squares of which each process holds the part that belongs to its shards.

The squares of a parameter are full-size only between the backward of its module and the next point
at which all processes are in step: there they are summed over the processes, each keeps its part,
and the full ones are freed. So no process holds more than about a module's squares.

Collectives must come in the same order in every process, whatever order its parameters are done in
(experts without a token, unused heads). The backward enters the modules whose parameters FSDP2 or
ZeRO-3 gathers in the same order everywhere, or the gathering itself would fail; whenever it enters
one, the module before it is flushed, squared or not. What comes later is flushed at the end of the
pass, for the parameters that any process has something for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from hf_ewc.fisher.processes import Processes
from hf_ewc.fisher.sharded.units import Unit, units_of
from hf_ewc.fisher.uses.ledger import Ledger
from hf_ewc.fisher.uses.nested import tensors_in
from hf_ewc.fisher.uses.square_sum import SquareSum
from hf_ewc.parameters import sharding

# Named so since torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(eq=False)
class _WholeSquareSum(SquareSum):
    """The sum of a parameter whose values may be away when its sum is begun."""

    shape: torch.Size = field(default_factory=torch.Size)

    def sum_of_squares(self) -> Tensor:
        if self.total is None:
            dtype = torch.promote_types(self.parameter.dtype, torch.float32)
            self.total = torch.zeros(self.shape, dtype=dtype, device=self.parameter.device)
        return self.total


class ShardedLedger(Ledger):
    """A ledger that keeps, of each sharded parameter's sum of squares, this process's part.

    Args:
        model: with parameters sharded by FSDP2 or ZeRO-3.
        parameters: the selected ones by name; those that FSDP2 was told to ignore are whole, and
            for them the sum is this process's own.
        processes: those in step.

    Raises:
        ValueError: a parameter is sharded in another way.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], processes: Processes
    ) -> None:
        units = units_of(model)
        whole = {name: p for unit in units for name, p in unit.parameters.items()}
        _refuse_others(model, parameters, whole, processes)
        super().__init__({name: whole.get(name, p) for name, p in parameters.items()})
        self._by_tensor = {
            key: _WholeSquareSum(
                one.name, one.parameter, shape=sharding.whole_shape(parameters[one.name])
            )
            for key, one in self._by_tensor.items()
        }
        self._by_name = {one.name: one for one in self._by_tensor.values()}
        self._sums = {
            name: sharding.zeros_like_values(parameter)
            for name, parameter in parameters.items()
            if sharding.is_sharded(parameter)
        }
        self._units = [
            Unit(unit.module, {n: p for n, p in unit.parameters.items() if n in self._sums})
            for unit in units
        ]
        self._model = model
        self._processes = processes
        self._current: Unit | None = None
        self._flushed: list[Unit] = []

    def totals(self) -> dict[str, Tensor]:
        """As of a ledger; sums over all processes in DTensors, and this one's own whole sums."""
        return {
            name: self._sums[name] if name in self._sums else one.sum_of_squares()
            for name, one in self._by_name.items()
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow which unit the backward is in, by the gradients of the units' outputs."""
        handles = [unit.module.register_forward_hook(self._hook(unit)) for unit in self._units]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, unit: Unit) -> Any:
        def begin(gradient: Tensor) -> None:
            self._begin(unit)

        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(begin)

        return watch

    def start_pass(self) -> None:
        super().start_pass()
        self._current, self._flushed = None, []

    def _begin(self, unit: Unit) -> None:
        """The backward enters `unit`: the one before is done, unless `unit` lies inside it."""
        done, self._current = self._current, unit
        if done is None or done is unit or done in self._flushed:
            return
        if any(module is unit.module for module in done.module.modules()):
            return
        self._flushed.append(done)
        self._flush(list(done.parameters))

    def finish_pass(self) -> None:
        names = list(self._sums)
        derived = self._processes.largest([bool(self._by_name[name].derived) for name in names])
        needed = {name for name, used in zip(names, derived, strict=True) if used}
        sharding.release(self._model)
        with self._gathered(needed):
            super().finish_pass()
        held = self._processes.largest([self._by_name[name].total is not None for name in names])
        self._flush([name for name, some in zip(names, held, strict=True) if some])

    @contextlib.contextmanager
    def _gathered(self, names: set[str]) -> Iterator[None]:
        """The whole values of these parameters, which what is derived from them may need."""
        units = [unit for unit in self._units if names & unit.parameters.keys()]
        fsdp: list[Any] = [u.module for u in units if isinstance(u.module, FSDPModule)]
        zero3 = [p for u in units for name, p in u.parameters.items() if name in names]
        for module in fsdp:
            module.unshard()
        try:
            with sharding.gathered(zero3):
                yield
                sharding.release(self._model)
        finally:
            for module in fsdp:
                module.reshard()

    @torch.no_grad()
    def _flush(self, names: Sequence[str]) -> None:
        """Sum what there is over the processes and keep this process's part; a collective."""
        for members in _by_layout(names, self._sums):
            wholes = []
            for name in members:
                wholes.append(self._by_name[name].sum_of_squares())
                self._by_name[name].total = None
            sums = [self._sums[name] for name in members]
            parts = _summed_parts(wholes, sums)
            for own, part in zip(sums, parts, strict=True):
                own.to_local().add_(part)


def _summed_parts(wholes: list[Tensor], likes: Sequence[DTensor]) -> list[Tensor]:
    """Σ over processes of each whole tensor, of which each gets the part that it has of `like`."""
    mesh, placements = likes[0].device_mesh, likes[0].placements
    cut = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    if len(cut) != 1 or placements[cut[0]] != Shard(0):
        return [_summed_part(whole, like) for whole, like in zip(wholes, likes, strict=True)]
    count = mesh.size(cut[0])
    sizes = [-(-like.shape[0] // count) * math.prod(like.shape[1:]) for like in likes]
    rows = [
        nn.functional.pad(whole.reshape(-1), (0, count * size - whole.numel())).view(count, size)
        for whole, size in zip(wholes, sizes, strict=True)
    ]
    summed = wholes[0].new_empty(sum(sizes))
    _reduce_scatter(summed, torch.cat(rows, 1).view(-1), group=mesh.get_group(cut[0]))
    for dim in range(mesh.ndim):
        if dim != cut[0]:
            dist.all_reduce(summed, group=mesh.get_group(dim))
    return [
        part[: like.to_local().numel()].view(like.to_local().shape)
        for part, like in zip(summed.split(sizes), likes, strict=True)
    ]


def _summed_part(whole: Tensor, like: DTensor) -> Tensor:
    mesh = like.device_mesh
    partial = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
    return partial.redistribute(mesh, like.placements).to_local()


def _by_layout(names: Sequence[str], sums: Mapping[str, DTensor]) -> list[list[str]]:
    """Names whose sums can be sent together."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        like = sums[name]
        groups.setdefault((like.device_mesh, like.placements, like.dtype), []).append(name)
    return list(groups.values())


def _refuse_others(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    processes: Processes,
) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            size, how = parameter.device_mesh.size(), str(parameter.placements)
        elif sharding.is_zero3(parameter):
            group = getattr(parameter, "ds_process_group", None)
            size, how = dist.get_world_size(group), "partitions of ZeRO-3"
        else:
            continue
        if name not in whole or size != processes.size:
            raise ValueError(
                f"{name!r} is held by {size} of {processes.size} processes as {how}, which is "
                "neither FSDP2 nor ZeRO-3 alone (tensor or expert parallelism?). Estimate the "
                "Fisher with one of these over all processes, or on the whole model."
            )
        if sharding.is_partitioned(parameter) and not hasattr(model, "ds_id"):
            raise ValueError(
                "The model's parameters are partitioned by ZeRO-3, but it has no DeepSpeed engine "
                "yet that gathers them for a forward. Consolidate after trainer.train(), or load "
                "the model without ZeRO-3 to estimate its Fisher."
            )
