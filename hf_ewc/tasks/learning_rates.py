"""What is trained within a task, and how fast: patterns of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_ewc.parameters.names import class_name, parameters_by_name
from hf_ewc.parameters.selection import layer_lambdas, select_parameters
from hf_ewc.tasks.sequence_config import SequenceConfig


def trained_names(model: nn.Module, config: SequenceConfig) -> list[str]:
    """The parameters that the patterns let train, among the trainable ones.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    try:
        return select_parameters(model, config.trained_modules, config.frozen_modules)
    except ValueError as error:
        message = str(error).replace("ewc_target_modules", "trained_modules")
        raise ValueError(message.replace("ewc_exclude_modules", "frozen_modules")) from None


@contextmanager
def only_these_train(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside the block all other parameters require no gradient."""
    parameters = parameters_by_name(model, trainable_only=True)
    frozen = [parameter for name, parameter in parameters.items() if name not in set(names)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in parameters_by_name(model).items():
            if name in parameters:
                parameter.requires_grad_(True)


def learning_rate_factors(model: nn.Module, patterns: Mapping[str, float]) -> dict[str, float]:
    """The factor of the learning rate of each trainable parameter that has one other than 1.

    Raises:
        ValueError: a pattern matches none of them.
    """
    names = list(parameters_by_name(model, trainable_only=True))
    try:
        factors = layer_lambdas(names, patterns, 1.0)
    except ValueError as error:
        message = str(error).replace("ewc_layer_lambdas", "learning_rate_factors")
        raise ValueError(message.replace("protected", "trainable")) from None
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def with_factors(optimizer: Any, model: nn.Module, factors: Mapping[str, float]) -> None:
    """Give each factor a group of its own in the optimizer, with its share of the learning rate.

    A scheduler multiplies the learning rates that groups begin with, and so keeps the factors.

    Raises:
        ValueError: the optimizer does not have these parameters.
    """
    by_id = {id(parameter): name for name, parameter in parameters_by_name(model).items()}
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            name = by_id.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"learning_rate_factors: {type(optimizer).__name__} holds tensors that are no "
                    f"parameters of {class_name(model)}; use an optimizer that has its own."
                )
            parts.setdefault(factors.get(name, 1.0), []).append(parameter)
        groups += [
            {**group, "params": parameters, "lr": group["lr"] * factor}
            for factor, parameters in parts.items()
        ]
    optimizer.param_groups[:] = groups
