"""The processes that estimate one Fisher together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from hf_ewc.fisher.memory import is_out_of_memory
from hf_ewc.precision import widest

# Elements that are summed over processes in one call: 64 MiB of fp32.
BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Processes:
    """One process among `size`; every method is a call that all of them make, in the same order.

    Args:
        rank: the number of this process.
        size: how many processes take part; with one, nothing is sent.
        device: where small tensors go that are sent.
        in_step: whether they also wait for each other within the model, as where its parameters
            are in shards.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    in_step: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator | None, device: torch.device) -> Processes:
        """The processes of `accelerator`, or those of torch.distributed where it runs."""
        if accelerator is not None:
            return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls()

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the processes."""
        if self.size == 1:
            return list(values)
        sent = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        return [int(value) for value in sent.tolist()]

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes, in fp64."""
        if self.size == 1:
            return list(values)
        sent = torch.tensor(values, dtype=widest(torch.device(self.device)), device=self.device)
        dist.all_reduce(sent)
        return list(sent.tolist())

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def add_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in the tensors' own precision."""
        if self.size == 1:
            return
        for bucket in _buckets(list(tensors.values())):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(summed.view(tensor.shape))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process meets inside is raised in all of them, so that none waits for others.

        But where memory ran out and they are in step, the others wait for this one within the model
        and would not hear of it, nor it of them: it ends at once, and its launcher ends the others.

        Raises:
            Exception: this process's own error.
            RuntimeError: the error of another process, by its text.
        """
        error = None
        try:
            yield
        except Exception as raised:
            if self.in_step and is_out_of_memory(raised):
                raise
            error = raised
        if not self.largest([error is not None])[0]:
            return
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank = next(rank for rank, text in enumerate(texts) if text is not None)
        raise RuntimeError(f"The Fisher was given up, since process {rank} met {texts[rank]}")


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors one after another in groups of about BUCKET_ELEMENTS, each of one dtype."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        alike = buckets and buckets[-1][0].dtype == tensor.dtype
        if not alike or filled + tensor.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets
