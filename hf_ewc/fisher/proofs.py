"""What has been proved of a model: for which batches the one-backward engine keeps examples apart.

A proof is remembered for as long as the model lives, by all that a forward depends on but the
values of weights and inputs: its modules, their code, hooks and attributes, configurations,
the parameters that are estimated, and autocast.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_ewc.fisher.engine.verification import Comparison
from hf_ewc.fisher.examples.layout import PLAIN
from hf_ewc.parameters.sharding import local_part

# How often parameters that had no gradient when a proof was made are looked at again.
_LATER_PROOFS = 3
# What every module has: its parameters, buffers, modules and hooks are looked at by themselves.
_OF_ANY_MODULE = vars(nn.Module()).keys()
# Attributes are looked at so deep, and tensors among them of up to so many numbers.
_DEEPEST, _SHORT = 3, 16
_NAMESPACES = (SimpleNamespace, argparse.Namespace)


class Mixed(Exception):
    """The one-backward engine has mixed the examples of a batch, which was not added.

    Args:
        names: the parameters in which it shows.
        earlier: those of them that batches before may have got wrong without a proof.
    """

    def __init__(self, names: list[str], earlier: list[str]) -> None:
        super().__init__(", ".join(names[:5]))
        self.earlier = earlier


@dataclass
class Proofs:
    """The structures of batches and the parameters that were proved."""

    structures: set[Hashable] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    _later: int = 0

    def are_due(self, structure: Hashable, totals: Mapping[str, Tensor]) -> bool:
        """For a batch of a new structure, or a parameter that has had its first gradient since.

        So it is with experts that got no token.
        """
        if structure not in self.structures:
            return True
        if self._later >= _LATER_PROOFS or not self.unproved(totals):
            return False
        self._later += 1
        return True

    def unproved(self, totals: Mapping[str, Tensor]) -> list[str]:
        """The parameters that have had a gradient, but none in a proof."""
        new = [name for name in totals if name not in self.parameters]
        return [name for name in new if local_part(totals[name]).any()]

    def add(self, structure: Hashable, found: Comparison) -> None:
        if found.proved:
            self.structures.add(structure)
            self.parameters |= found.proved


_remembered: WeakKeyDictionary[nn.Module, dict[Hashable, Proofs]] = WeakKeyDictionary()


def proofs_of(model: nn.Module, parameters: Iterable[str]) -> Proofs:
    """What was proved of this model, as it is now."""
    of_model = _remembered.setdefault(model, {})
    proofs = of_model.setdefault((tuple(parameters), _fingerprint(model)), Proofs())
    proofs._later = 0
    return proofs


def _fingerprint(model: nn.Module) -> Hashable:
    modules = tuple((name, *_of_module(module)) for name, module in model.named_modules())
    tied = {id(p): name for name, p in model.named_parameters()}
    parameters = tuple(
        (name, tied[id(p)], tuple(p.shape), p.stride(), p.dtype, p.requires_grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    )
    own = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
    configs = tuple(_described(config) for config in own.values())
    kinds = {type(module) for module in model.modules()}
    of_classes = tuple(_of_class(kind) for kind in sorted(kinds, key=lambda k: k.__qualname__))
    buffers = tuple((name, _of_attribute(b)) for name, b in model.named_buffers())
    autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return modules, parameters, configs, of_classes, buffers, autocast


def _of_class(kind: type) -> Hashable:
    """The settings that a module's classes hold for all of their modules."""
    return tuple(
        (name, value)
        for each in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, value in vars(each).items()
        if isinstance(value, PLAIN) and not name.startswith("__")
    )


def _described(value: Any) -> Hashable:
    """A configuration, nested ones included: many times quicker than its JSON."""
    if isinstance(value, Mapping):
        return tuple((str(key), _described(item)) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return tuple(map(_described, value))
    if isinstance(value, PLAIN) or callable(value) or not hasattr(value, "__dict__"):
        return str(value)
    return type(value), _described(vars(value))


def _of_module(module: nn.Module) -> tuple[Any, ...]:
    attributes = tuple(
        (name, _of_attribute(value))
        for name, value in vars(module).items()
        if name not in _OF_ANY_MODULE and name not in ("training", "config")
    )
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    own = vars(module).get("forward")
    code = getattr(type(module), "forward", None)  # of TorchScript there is none to be had
    return type(module), code, id(own), tuple(map(len, hooks)), attributes


def _of_attribute(value: Any, depth: int = _DEEPEST) -> Hashable:
    """What an attribute says of a mode: of a short tensor its numbers, of others their types."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        numbers = () if value.is_meta or value.numel() > _SHORT else tuple(value.flatten().tolist())
        return str(value.dtype), tuple(value.shape), numbers
    if depth == 0 or callable(value):
        return type(value), id(value)
    if isinstance(value, Mapping):
        return tuple((str(k), _of_attribute(v, depth - 1)) for k, v in tuple(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_of_attribute(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(str, value)))
    if isinstance(value, _NAMESPACES) or (
        dataclasses.is_dataclass(value) and hasattr(value, "__dict__")
    ):
        return type(value), _of_attribute(vars(value), depth - 1)
    return type(value), id(value)  # looking into what is not known may change it
