"""What the head of a model was for, which names and shapes of its parameters do not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_ewc.parameters.adapters import base_model, placed_by_name
from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.state.records import is_list_of
from hf_ewc.state.sampling import hashes

_UNNAMED = re.compile(r"LABEL_\d+")
UNRELATED = 0.9
"""A head that is further than this part of its anchor's norm away from it is another head.

Two that have nothing to do with each other are √(1 + ‖θ‖²/‖θ*‖²) apart, up to chance.
"""

_MORE_THAN_CHANCE = 3.0  # standard deviations


def of_model(model: nn.Module, names: Iterable[str]) -> dict[str, Any] | None:
    """The head of `model`, as far as it is among the parameters `names`; None where it has none.

    Returns:
        "parameters": its names; "labels": those of its classes, None where it has no classes;
        "hashes": of its values (see `sampling.hashes`), None where they are not in this process.
    """
    parameters = _parameters(model, names)
    if not parameters:
        return None
    return {
        "parameters": sorted(parameters),
        "labels": _labels(model),
        "hashes": hashes(parameters),
    }


def is_recorded(found: Any) -> bool:
    """Whether this is what `of_model` returns."""
    if found is None:
        return True
    if not isinstance(found, Mapping) or not found.keys() >= {"parameters", "labels", "hashes"}:
        return False
    is_words = is_list_of(str)
    lists = (found["labels"], found["hashes"])
    named = is_words(found["parameters"]) and len(found["parameters"]) > 0
    return named and all(value is None or is_words(value) for value in lists)


def mismatches(recorded: Any, model: nn.Module, names: Iterable[str]) -> list[str]:
    """How the head of `model` is for other labels than the recorded one, if `names` have it."""
    if not isinstance(recorded, Mapping) or not set(names) & set(recorded["parameters"]):
        return []
    then, now = recorded["labels"], _labels(model)
    if then is None or now is None or _are_unnamed(then) or _are_unnamed(now):
        return []
    if then == now[: len(then)]:  # the same, or one that has grown
        return []
    return [
        f"the head ({', '.join(recorded['parameters'][:2])}) was for the labels {_shown(then)}; "
        f"this model's are {_shown(now)}. state.without(['{module_of(recorded)}']) gives the old "
        "head up."
    ]


def replaced(recorded: Any, model: nn.Module, distances: Mapping[str, float]) -> list[str]:
    """The weights of a head that were put in the place of those that were consolidated.

    Args:
        recorded: the head as it was consolidated.
        model: as training begins.
        distances: ‖θ − θ*‖ / ‖θ*‖ of the weight matrices that the penalty holds.

    Returns:
        Their names, where the head's values changed since and are `UNRELATED` to the anchor, while
        all others are near theirs.
    """
    if not isinstance(recorded, Mapping) or recorded["hashes"] is None:
        return []
    own = set(recorded["parameters"])
    if any(distance > UNRELATED for name, distance in distances.items() if name not in own):
        return []
    far = [name for name, distance in distances.items() if name in own and distance > UNRELATED]
    if not far:
        return []
    now = hashes(_parameters(model, own))
    return [] if now is None or set(now) & set(recorded["hashes"]) else far


def is_like(theta: Tensor, anchor: Tensor) -> bool:
    """Whether the cosine between a head and its anchor is more than chance makes it, 1/√n.

    Of heads that have nothing to do with each other, one in a thousand is.
    """
    now, then = theta.detach().flatten().double().cpu(), anchor.flatten().double().cpu()
    now = now[then != 0]
    then = then[then != 0]
    scale = float(now.norm() * then.norm())
    return scale > 0 and float(now @ then) / scale > _MORE_THAN_CHANCE / len(then) ** 0.5


def _parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the parameters `names` that lie outside the body, transformers' `base_model`."""
    whole = base_model(model)
    body = getattr(whole, "base_model", whole)
    if body is whole or not isinstance(body, nn.Module):
        return {}
    inside = {id(parameter) for parameter in body.parameters()}
    own, wanted = parameters_by_name(model), set(names)
    placed = own if wanted <= own.keys() else placed_by_name(wanted, model)
    return {n: p for n, p in placed.items() if n in wanted and id(p) not in inside}


def _labels(model: nn.Module) -> list[str] | None:
    whole = base_model(model)
    getter = getattr(whole, "get_output_embeddings", None)
    if callable(getter) and getter() is not None:  # the head's classes are the vocabulary
        return None
    names = getattr(getattr(whole, "config", None), "id2label", None)
    if not isinstance(names, Mapping):
        return None
    return [str(names[number]) for number in sorted(names)]


def _are_unnamed(labels: list[str]) -> bool:
    return all(map(_UNNAMED.fullmatch, labels))


def _shown(labels: list[str]) -> str:
    return ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")


def module_of(recorded: Mapping[str, Any]) -> str:
    """The outermost module that holds the head: what `state.without` takes."""
    return str(recorded["parameters"][0]).removeprefix("base_model.model.").split(".")[0]
