"""A PEFT adapter under another name: what that changes in a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_adapter(name: str, old: str, new: str) -> str:
    """`name` with the adapter `new` in the place of `old`; as it is if it is of another.

    >>> of_adapter("base_model.model.q_proj.lora_A.default.weight", "default", "german")
    'base_model.model.q_proj.lora_A.german.weight'
    """
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part == old and i > 0]
    if places:
        parts[places[-1]] = new
    return ".".join(parts)


def of_fingerprint(recorded: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The fingerprint of the model with the adapter so renamed."""
    renamed = dict(recorded)
    if isinstance(recorded.get("adapters"), Mapping):
        renamed["adapters"] = {
            new if name == old else name: kind for name, kind in recorded["adapters"].items()
        }
    if isinstance(recorded.get("head"), Mapping):
        names = [of_adapter(name, old, new) for name in recorded["head"]["parameters"]]
        # Its hashes are of names and values; under another name they tell nothing.
        renamed["head"] = {**recorded["head"], "parameters": names, "hashes": None}
    if recorded.get("free"):
        renamed["free"] = [of_adapter(name, old, new) for name in recorded["free"]]
    return renamed
