"""Values of settings, as people, command lines and YAML give them, checked and in one type.

Each function takes the name of the setting for its message, and raises a `ValueError` that says
what was seen and what is allowed.
"""

from __future__ import annotations

import json
import math
from numbers import Integral
from typing import Any, NoReturn

from hf_ewc.parameters.selection import ALL_LINEAR, compiled_regex, is_regex


def hint(text: str, **options: Any) -> dict[str, Any]:
    return {"help": text, **options}


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{name} is {value!r}; allowed is {allowed}.")


def number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    also: str = "",
) -> float:
    allowed = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
    allowed += f" and at most {high:g}" if high < math.inf else ""
    allowed += f", or {also}" if also else ""
    try:
        # YAML reads 1e4, without a dot, as a string.
        found = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or found < low or found > high or (open_low and found == low):
        refuse(name, value, allowed)
    return found


def share(name: str, value: object) -> float:
    """A part of a whole that is not nothing."""
    return number(name, value, low=0.0, high=1.0, open_low=True)


def integer(name: str, value: object, low: int, also: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        refuse(name, value, f"an integer of at least {low}" + (f", or {also}" if also else ""))
    return int(value)


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        refuse(name, value, "one of " + ", ".join(repr(choice) for choice in choices))


def by_pattern(name: str, value: object) -> dict[str, float] | None:
    allowed = "a dict from pattern to number, or one as a JSON string"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is {value!r}, no JSON ({error}); give {allowed}.") from None
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        refuse(name, value, allowed)
    items: dict[str, object] = value
    for pattern in filter(is_regex, items):
        _valid_regex(name, pattern)
    return {key: number(f"{name}[{key!r}]", entry, low=0.0) for key, entry in items.items()}


def modules(name: str, value: object) -> list[str] | str | None:
    """`value` as None, one regular expression, "all-linear", or a list of suffixes.

    A list of one entry that is no suffix but one of the former, as the command line gives it,
    stands for that entry.
    """
    if value is None:
        return None
    entries = [value] if isinstance(value, str) else _texts(value)
    if not entries or not all(entries):
        refuse(name, value, "a list of module-name suffixes, a regular expression or None")
    only = entries[0] if len(entries) == 1 else ""
    if only.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(value, str) or is_regex(only):
        _valid_regex(name, only)
        return only
    return entries


def _texts(value: object) -> list[str]:
    """The entries of a list, tuple or set of strings, sets in order; empty for anything else."""
    if not isinstance(value, (tuple, list, set, frozenset)):
        return []
    if not all(isinstance(entry, str) for entry in value):
        return []
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def _valid_regex(name: str, pattern: str) -> None:
    try:
        compiled_regex(pattern)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
