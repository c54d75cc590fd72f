"""What is gathered and reduced together: FSDP2 modules, ZeRO-3 parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_ewc.parameters import sharding
from hf_ewc.parameters.names import canonical_name


@dataclass
class Unit:
    """A module that the backward enters and leaves, and its parameters by name, whole.

    Those of units inside it are not among them.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def units_of(model: nn.Module) -> list[Unit]:
    """The FSDP2 modules; under ZeRO-3 the layers, which are the entries of the outermost lists."""
    if any(sharding.is_zero3(parameter) for parameter in model.parameters()):
        return _zero3_units(model)
    return _fsdp2_units(model)


def _fsdp2_units(model: nn.Module) -> list[Unit]:
    """With the whole parameters that the modules hold while they run.

    FSDP2 puts other Parameter objects into its modules for as long as these are gathered, and uses
    the same ones each time. They are looked up one module after another.
    """
    sharding.reshard(model)
    units = []
    for prefix, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        fsdp: Any = module
        sharded = dict(fsdp.named_parameters(prefix))
        fsdp.unshard()
        whole = {
            canonical_name(name): parameter
            for name, parameter in fsdp.named_parameters(prefix)
            if parameter is not sharded.get(name) and not isinstance(parameter, DTensor)
        }
        fsdp.reshard()
        units.append(Unit(fsdp, whole))
    return units


def _zero3_units(model: nn.Module) -> list[Unit]:
    layers = dict(_layers(model, ""))
    units = [Unit(m, _named_parameters(m, prefix)) for prefix, m in layers.items()]
    inside = {id(p) for unit in units for p in unit.parameters.values()}
    rest = {n: p for n, p in _named_parameters(model, "").items() if id(p) not in inside}
    return [Unit(model, rest), *units]


def _named_parameters(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {canonical_name(name): p for name, p in module.named_parameters(prefix)}


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(module, nn.ModuleList):
            yield path, child
        else:
            yield from _layers(child, path)
