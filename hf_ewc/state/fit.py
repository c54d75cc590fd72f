"""Whether a state fits a model: names, shapes, adapters and what lies under them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from hf_ewc.parameters.adapters import placed_by_name
from hf_ewc.parameters.names import class_name
from hf_ewc.state import fingerprint, heads, tied
from hf_ewc.state.compatibility import advice, misfits, refuse_misfits

_last_checked: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = (
    weakref.WeakKeyDictionary()
)


def check_names(
    shapes: Mapping[str, torch.Size], recorded: Any, model: nn.Module, values_needed: bool
) -> None:
    """Raise unless `model` has the parameters of a state.

    Args:
        shapes: of the state's parameters by name.
        recorded: the fingerprint of the model that was consolidated, or None.
        model: the one that is there.
        values_needed: whether values in parts, under ZeRO-3, are a problem.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """
    parameters = placed_by_name(shapes, model)
    problems = misfits(shapes, parameters, "the state", values_needed)
    if not problems:
        return
    known = recorded if isinstance(recorded, Mapping) else {}
    of, hint = f" of {known['model']}" if known.get("model") else "", advice(shapes, parameters)
    there, now = list(known.get("adapters") or ()), fingerprint.adapters(model)
    missing = [name for name in there if name not in now]
    if missing:
        of += f" with the adapter {missing[0]!r}"
        hint = _about(missing[0], [name for name in now if name not in there])
    having = f" with {_listed(list(now))}" if there or now else ""
    refuse_misfits(f"The state{of} does not fit {class_name(model)}{having}", problems, hint)


def check_fingerprint(recorded: Any, names: Collection[str], model: nn.Module) -> None:
    """Raise unless `model` stands on the base, and has the head and ties, that were recorded.

    Raises:
        ValueError: the base under an adapter is another, the head was for other labels, or a
            parameter that was tied to one of the state is one of its own.
    """
    if isinstance(recorded, Mapping):
        problems = fingerprint.mismatches(recorded, model)
        problems += heads.mismatches(recorded.get("head"), model, names)
        problems += tied.mismatches(recorded.get("tied"), model, names)
        refuse_misfits("The state belongs to another model", problems)


def check_once(state: object, check: Callable[[nn.Module], None], model: nn.Module) -> None:
    """check(model), where it is not the one that `state` was held to last."""
    last = _last_checked.get(model)
    if last is None or last() is not state:
        check(model)
        _last_checked[model] = weakref.ref(state)


def _about(missing: str, others: list[str]) -> str:
    load = (
        f"Load that adapter: PeftModel.from_pretrained(base, folder, adapter_name={missing!r}, "
        "is_trainable=True)."
    )
    if not others:
        return load
    renaming = f"state.rename_adapter({missing!r}, {others[0]!r})"
    return f"{load} If it is called {others[0]!r} now: {renaming}."


def _listed(adapters: list[str]) -> str:
    if not adapters:
        return "no adapter"
    return f"the adapter{'s' if len(adapters) > 1 else ''} {', '.join(map(repr, adapters))}"
