"""Whether importances and anchors make a state, and a state fits a model: every problem at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ewc.parameters.sharding import is_partitioned, is_zero3, whole_shape
from hf_ewc.state.packed import TensorMap


def validate(importance: TensorMap, anchor: TensorMap, offsets: Mapping[str, float]) -> None:
    """Raise a `ValueError` unless importances, anchors and offsets make a state together."""
    problems = [f"{name}: has an importance, no anchor" for name in importance.keys() - anchor]
    problems += [f"{name}: has an anchor, no importance" for name in anchor.keys() - importance]
    for name in importance.keys() & anchor:
        strength, center = importance.packed(name), anchor.packed(name)
        if strength.shape != center.shape:
            shapes = f"{list(strength.shape)}, the anchor {list(center.shape)}"
            problems.append(f"{name}: the importance is {shapes}")
        problems += [f"{name}: the importance {problem}" for problem in strength.problems(True)]
        problems += [f"{name}: the anchor {problem}" for problem in center.problems(False)]
    for name, value in offsets.items():
        if name not in importance:
            problems.append(f"{name}: has an offset, no importance")
        if not 0.0 <= value < math.inf:
            problems.append(f"{name}: the offset is {value}; it is finite and at least 0")
    refuse_misfits("The importances and anchors make no state", sorted(problems))


def misfits(
    needed: Mapping[str, torch.Size],
    parameters: Mapping[str, Tensor],
    owner: str,
    values_needed: bool = True,
    gathers: bool = False,
) -> list[str]:
    """What of `needed`, the shapes that `owner` has, is not so in `parameters`, one phrase each.

    Args:
        values_needed: values in parts are a problem,
        gathers: but not where they will be gathered.
    """
    problems = []
    for name, shape in needed.items():
        if name not in parameters:
            problems.append(f"{name}: in {owner}, not among the parameters")
        elif (
            values_needed
            and is_partitioned(parameters[name])
            and not (gathers and is_zero3(parameters[name]))
        ):
            problems.append(f"{name}: held in parts by DeepSpeed ZeRO-3; gather it first")
        elif whole_shape(parameters[name]) != shape:
            seen = list(whole_shape(parameters[name]))
            problems.append(f"{name}: {list(shape)} in {owner}, {seen} among the parameters")
    return problems


def advice(needed: Mapping[str, torch.Size], parameters: Mapping[str, Tensor]) -> str:
    """What to do about parameters that are missing or have other shapes."""
    there = {name: whole_shape(parameters[name]) for name in needed if name in parameters}
    grown = any(s[1:] == needed[name][1:] and s[:1] > needed[name][:1] for name, s in there.items())
    rows = "Rows that a classifier or an embedding has gained are admitted by state.grow_rows. "
    return (
        "Use the model that was consolidated. "
        + (rows if grown else "")
        + "What was replaced, such as a head, is given up by state.without(['its name'])."
    )


def refuse_misfits(title: str, problems: list[str], hint: str = "") -> None:
    if not problems:
        return
    shown, rest = problems[:10], len(problems) - 10
    lines = [f"{title}:", *shown, *([f"and {rest} more"] if rest > 0 else [])]
    raise ValueError("\n  ".join(lines) + (f"\n{hint}" if hint else ""))
