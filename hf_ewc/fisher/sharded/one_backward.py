"""All examples of all processes in one backward, where each holds a part of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_ewc.fisher.engine.one_backward import OneBackward
from hf_ewc.fisher.engine.protocol import Objectives, Witness
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.processes import Processes
from hf_ewc.fisher.sharded.ledger import ShardedLedger
from hf_ewc.parameters import sharding


class ShardedOneBackward(OneBackward):
    """All examples of all processes in one backward, into this process's parts of the sums."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], processes: Processes
    ) -> None:
        self.ledger = ShardedLedger(model, parameters, processes)
        super().__init__(model, parameters, self.ledger)
        self._processes = processes

    def add(
        self, batch: ExampleBatch, objectives: Objectives, witness: Witness | None = None
    ) -> None:
        """Raises `UncoveredUse` in every process, with nothing added, if one has such a use."""
        with self.ledger.watching(), kept_whole():
            super().add(batch, objectives, witness)

    def _refuse(self, uncovered: list[tuple[str, str]]) -> None:
        if self._processes.largest([len(uncovered)])[0]:
            _forget_forward(self._model)
            everywhere = [use for uses in self._processes.gather(uncovered) for use in uses]
            super()._refuse(list(dict.fromkeys(everywhere)))


def _forget_forward(model: nn.Module) -> None:
    """Let FSDP2 forget a forward that no backward follows."""
    sharding.release(model)
    reset = getattr(model, "reset_iter_state", None)  # torch 2.13 and later
    if callable(reset) and isinstance(model, FSDPModule):
        reset()


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """Parameters that ZeRO-3 gathered for a forward stay as they are until its last backward.

    DeepSpeed gathers them anew for the first backward only.
    """

    def pack(tensor: Tensor) -> Tensor:
        return tensor.detach() if sharding.is_zero3(tensor) else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
