"""Parameters of which a process holds a part: DTensors (FSDP2) and DeepSpeed ZeRO-3 partitions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, zeros


def reshard(model: nn.Module) -> None:
    """Let FSDP2 modules hold their shards again.

    After a forward without a backward (an evaluation) FSDP2 leaves the outermost parameters
    gathered: other objects, whose memory it takes back at the next backward.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def release(model: nn.Module) -> None:
    """As `reshard`, and let ZeRO-3 take the values away that were gathered for a backward.

    Of modules whose inputs need no gradient DeepSpeed's hooks do not see the end; its own engine
    does likewise after each step.
    """
    reshard(model)
    for parameter in model.parameters():
        if is_zero3(parameter):
            zero3 = cast(Any, parameter)
            zero3.ds_active_sub_modules.clear()
            if not zero3.ds_persist and zero3.ds_status.name == "AVAILABLE":
                zero3.partition()


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of `parameter`: its shard, or all of it."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    if is_zero3(parameter):
        partition: Tensor = cast(Any, parameter).ds_tensor.detach()
        return partition
    return parameter


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The entries of the whole `tensor` that belong to this process's part of `parameter`."""
    if isinstance(parameter, DTensor):
        part = local_part(place_like(tensor, parameter))
        return part if isinstance(tensor, DTensor) else part.clone()  # which lets go of the whole
    if is_zero3(parameter):
        return _partition_like(tensor, parameter)
    return tensor


def layout(parameter: Tensor) -> tuple[object, ...]:
    """Equal for parameters whose parts lie on the same devices in the same way."""
    device = local_part(parameter).device
    if isinstance(parameter, DTensor):
        return device, parameter.device_mesh, parameter.placements
    return device, cast(Any, parameter).ds_process_group if is_zero3(parameter) else None


def summed_over_parts(values: Tensor, parameter: Tensor) -> Tensor:
    """Sums over each process's part of parameters that lie as `parameter` → over the whole."""
    if isinstance(parameter, DTensor):
        placements = [Partial() if p.is_shard() else Replicate() for p in parameter.placements]
        return DTensor.from_local(values, parameter.device_mesh, placements).full_tensor()
    if is_zero3(parameter):
        values = values.clone()
        torch.distributed.all_reduce(values, group=cast(Any, parameter).ds_process_group)
    return values


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process may hold a part of `parameter` only."""
    return isinstance(parameter, DTensor) or is_zero3(parameter)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has taken the values of `parameter` away (it is empty here)."""
    return hasattr(parameter, "ds_shape") and parameter.shape != parameter.ds_shape


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def values(parameter: Tensor) -> Tensor:
    """`parameter`, or for ZeRO-3's its values in a DTensor: each process has some rows.

    Partitions of ZeRO-3 follow no axis, so nothing but ZeRO-3 could read them; rows can be gathered
    and saved as those of FSDP2 are. The parameter is gathered for a moment, by all processes.
    """
    if not is_zero3(parameter):
        return parameter
    with gathered([parameter]):
        return values_like(parameter.detach(), parameter)


def values_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, shaped as `parameter` and in every process, as `values(parameter)` lies."""
    return _rows_of(whole, zeros_like_values(parameter)) if is_zero3(parameter) else whole


def whole_values(parameter: Tensor) -> Tensor:
    """All values of `parameter`, detached; where it is in parts, gathered by all processes."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if not is_zero3(parameter):
        return parameter.detach()
    with gathered([parameter]):
        return parameter.detach().clone()


def first_entry(parameter: Tensor) -> int:
    """Where this process's part of `parameter` begins, counted in the flat whole.

    Raises:
        ValueError: its part is not one run of entries: sharded along another axis than the first.
    """
    if is_zero3(parameter):
        rank = torch.distributed.get_rank(group=cast(Any, parameter).ds_process_group)
        return local_part(parameter).numel() * rank
    if not isinstance(parameter, DTensor):
        return 0
    sharded = [axis for axis, p in enumerate(parameter.placements) if p.is_shard()]
    if not sharded:
        return 0
    if len(sharded) > 1 or not parameter.placements[sharded[0]].is_shard(0):
        raise ValueError(
            f"A weight under an adapter is sharded as {parameter.placements}; needed is one shard "
            "of its rows a process, as fully_shard makes them. Use ewc_space='adapter'."
        )
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    chunk = -(-rows // mesh.size(sharded[0]))
    first = min(mesh.get_local_rank(sharded[0]) * chunk, rows)
    return first * parameter.shape[1:].numel()


def zeros_like_values(parameter: Tensor) -> DTensor:
    """Zeros in fp32 (fp64 for fp64) that lie as `values(parameter)` does."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if isinstance(parameter, DTensor):
        local = torch.zeros_like(parameter.to_local(), dtype=dtype, requires_grad=False)
        return cast(DTensor, with_local(local, parameter))
    shape = whole_shape(parameter)
    mesh = init_device_mesh(parameter.device.type, (torch.distributed.get_world_size(),))
    placement = [Shard(0) if shape else Replicate()]
    return zeros(shape, dtype=dtype, device_mesh=mesh, placements=placement)


def local_rows(whole: Tensor, like: DTensor) -> Tensor:
    """The entries of `whole`, which every process has, that belong to its part of `like`."""
    return _rows_of(whole, like).to_local()


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """ZeRO-3 parameters with their whole values, for all processes; others are left alone."""
    partitioned = [parameter for parameter in parameters if is_zero3(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned):
        yield


def is_zero3(parameter: Tensor) -> bool:
    """Whether ZeRO-3 owns `parameter` (small ones it leaves whole count as well)."""
    return hasattr(parameter, "ds_tensor")


def _partition_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """ZeRO-3 cuts the flat parameter into equal parts, the last one padded."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    size = local_part(parameter).numel()
    start = size * torch.distributed.get_rank(group=cast(Any, parameter).ds_process_group)
    part = torch.zeros(size, dtype=tensor.dtype, device=tensor.device)
    own = tensor.reshape(-1)[start : start + size]
    part[: own.numel()] = own
    return part


def _rows_of(whole: Tensor, like: DTensor) -> DTensor:
    # Every process has the whole tensor already, so nothing is sent.
    there = whole.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which this process holds one shard (FSDP2)."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of `tensor`; for a DTensor every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_local(local: Tensor, like: Tensor, row: Sequence[int] | None = None) -> Tensor:
    """The tensor of which this process holds `local`, in any shape, and that lies as `like` does.

    Args:
        row: its shape after the first axis if that is another than of `like`, which then may be
            sharded on its first axis only.
    """
    shape = like.shape if row is None else torch.Size((*like.shape[:1], *row))
    if not isinstance(like, DTensor):
        return local.view(shape)
    own = like.to_local().shape
    local = local.view(own if row is None else (*own[:1], *row))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` on the device of `like`, and in the same shards if `like` is a DTensor."""
    if not isinstance(like, DTensor):
        return whole(tensor).to(like.device)
    if isinstance(tensor, DTensor):
        return tensor.redistribute(like.device_mesh, like.placements)
    return _rows_of(tensor, like)
