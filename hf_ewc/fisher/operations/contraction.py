"""Contractions spelled as `einsum`, of the batch with one parameter.

The letters of the parameter W are paired (p: also in x and in the result), contracted (k: also in
x, not in the result) or its own (o); those of x alone are free (t). Then

    y[b, p, t, o] = Σ_k x[b, p, t, k] W[p, k, o],

a matrix product for each p.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_ewc.fisher.operations.elementwise import batched
from hf_ewc.fisher.operations.linear import times_weight
from hf_ewc.fisher.operations.registry import covers
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.tracking import Tracker


@covers("einsum")
def _handle_einsum(tracker: Tracker, call: Call) -> Any:
    equation, operands = call.args[0], call.args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        raise Uncovered
    letters, result = equation.replace(" ", "").split("->")
    of_x, of_weight = letters.split(",")
    x, weight = operands
    if tracker.is_shared(x):
        x, weight, of_x, of_weight = weight, x, of_weight, of_x
    if "..." in of_x and "..." in result:
        leading = "ABCDEFGH"[: x.dim() - len(of_x) + 3]
        of_x, result = of_x.replace("...", leading), result.replace("...", leading)
    spelled_out = f"{of_x}{of_weight}{result}"
    if not tracker.is_used(weight) or "." in spelled_out:
        raise Uncovered
    if any(len(set(word)) < len(word) for word in (of_x, of_weight, result)):
        raise Uncovered
    return contract(tracker, x, of_x, weight, of_weight, result)


def contract(
    tracker: Tracker, x: Tensor, of_x: str, weight: Tensor, of_weight: str, result: str
) -> Tensor:
    """einsum("of_x,of_weight->result", x, weight) with the use of the weight opened."""
    x, axis = tracker.examples_first(x)
    example = of_x[axis]
    if example not in result:
        raise Uncovered
    of_x = example + of_x.replace(example, "")
    front = example + result.replace(example, "")
    found = _with_weight(tracker, x, of_x, weight, of_weight, front)
    return found.movedim(0, result.index(example)) if front != result else found


def _with_weight(
    tracker: Tracker, x: Tensor, of_x: str, weight: Tensor, of_weight: str, result: str
) -> Tensor:
    """With the letter of the examples first in x and in the result."""
    if of_x[0] in of_weight:  # a row of the parameter for each row of x
        weight = tracker.share(weight.movedim(of_weight.index(of_x[0]), 0))
        of_weight = of_x[0] + of_weight.replace(of_x[0], "")
        rows = batched(tracker, weight, x, rank=weight.dim())
        return torch.einsum(f"{of_x},{of_weight}->{result}", x, rows)
    return _contract(tracker, x, of_x, weight, of_weight, result)


def _contract(
    tracker: Tracker, x: Tensor, of_x: str, weight: Tensor, of_weight: str, result: str
) -> Tensor:
    paired = [letter for letter in of_weight if letter in of_x and letter in result]
    contracted = [letter for letter in of_weight if letter in of_x and letter not in result]
    own = [letter for letter in of_weight if letter not in of_x]
    free = [letter for letter in of_x[1:] if letter not in of_weight]
    sizes = {
        **dict(zip(of_x, x.shape, strict=True)),
        **dict(zip(of_weight, weight.shape, strict=True)),
    }
    if set(result) != {of_x[0], *paired, *free, *own}:  # a letter summed within one operand
        raise Uncovered

    def size(group: list[str]) -> int:
        return math.prod(sizes[letter] for letter in group)

    pairs = [size(paired)] if paired else []
    order = [of_x[0], *paired, *free, *contracted]
    rows = x.permute([of_x.index(letter) for letter in order])
    rows = rows.reshape(x.shape[0], *pairs, size(free), size(contracted))
    matrix = weight.permute([of_weight.index(letter) for letter in (*paired, *contracted, *own)])
    matrix = matrix.reshape(*pairs, size(contracted), size(own))
    product = times_weight(tracker, tracker.follow(rows, x), matrix)
    found = [of_x[0], *paired, *free, *own]
    product = product.reshape([sizes[letter] for letter in found])
    return product.permute([found.index(letter) for letter in result])
