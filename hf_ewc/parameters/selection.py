"""Which parameters a pattern selects, by the conventions of PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from hf_ewc.parameters.adapters import base_model, plain_module, weights_by_name
from hf_ewc.parameters.names import canonical_name, class_name, parameters_by_name, unwrap

ALL_LINEAR = "all-linear"
_REGEX_CHARACTERS = frozenset("*+?()[]{}|\\^$")


def is_regex(pattern: str) -> bool:
    """Whether `pattern` holds a character that module names do not have, such as `*` or `|`."""
    return not _REGEX_CHARACTERS.isdisjoint(pattern)


def select_parameters(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    trainable_only: bool = True,
    space: str = "adapter",
) -> list[str]:
    """Names of the parameters inside the modules that the patterns select.

    The patterns follow PEFT: a list holds suffixes of module names ("q_proj", "layer.0.attention"),
    a string is one regular expression that a whole module name must match, and "all-linear" stands
    for every linear map but the output layer: the output embedding, or the head of a model that has
    none. A module selects all parameters inside it; a
    parameter's own name can be given as well ("bias", "cls_token").

    Args:
        model: a module, wrapped or not.
        target_modules: what to take; None takes every parameter.
        exclude_modules: what to leave out of that; None leaves out nothing.
        trainable_only: take parameters that require a gradient only.
        space: "weight" takes the weights of a model with adapters, by the names that they have
            without, for its parameters; trainable is what an adapter changes.

    Raises:
        ValueError: an entry matches nothing, a regular expression is invalid, nothing is left.
    """
    every = weights_by_name(model) if space == "weight" else parameters_by_name(model)
    trainable = [name for name, p in every.items() if p.requires_grad or not trainable_only]
    if not trainable:
        raise ValueError(
            f"No parameter of {class_name(model)} requires a gradient, so there is none "
            "to protect. A PEFT adapter loaded without is_trainable=True is frozen."
        )
    chosen = set(trainable)
    if target_modules is not None:
        what = "trainable parameter" if trainable_only else "parameter"
        chosen = _matched("ewc_target_modules", target_modules, model, trainable, what)
    if exclude_modules is not None:
        chosen -= _matched("ewc_exclude_modules", exclude_modules, model, list(every), "parameter")
    if not chosen:
        raise ValueError(
            f"ewc_target_modules={target_modules!r} and ewc_exclude_modules={exclude_modules!r} "
            f"leave none of the {len(trainable)} trainable parameters; select at least one."
        )
    return [name for name in trainable if name in chosen]


def layer_lambdas(
    names: Iterable[str], patterns: Mapping[str, float] | None, default: float
) -> dict[str, float]:
    """λ of each parameter: that of the longest pattern that matches it, else `default`.

    A pattern is a suffix of the name of a module around the parameter, or of the parameter itself
    ("encoder.layer.0", "bias"); with a character such as `*` or `|` it is a regular expression for
    such a suffix (as in PEFT's `rank_pattern`). Of two patterns as long, the later one wins.

    Raises:
        ValueError: a pattern matches none of the names, or is an invalid regular expression.
    """
    values = dict.fromkeys(names, default)
    for pattern, value in sorted((patterns or {}).items(), key=lambda item: len(item[0])):
        matched = [name for name in values if _any_level(name, _suffix_matcher(pattern))]
        if not matched:
            raise ValueError(
                f"ewc_layer_lambdas: {pattern!r} matches none of the {len(values)} protected "
                f"parameters, such as {_examples(values)}."
            )
        values.update(dict.fromkeys(matched, value))
    return values


def _matched(
    field: str, patterns: Sequence[str] | str, model: nn.Module, names: list[str], what: str
) -> set[str]:
    if isinstance(patterns, str) and patterns.lower() == ALL_LINEAR:
        linear = {name for own in _linear_modules(model) for name in (own, plain_module(own))}
        return {name for name in names if _any_level(name, linear.__contains__)}
    return names_in(patterns, names, field, class_name(model), what)


def names_in(
    patterns: Sequence[str] | str,
    names: Sequence[str],
    field: str,
    owner: str,
    what: str = "parameter",
) -> set[str]:
    """Those of the names that lie in the modules of the patterns, a list or one regular expression.

    Raises:
        ValueError: an entry matches none; it names `field`, and `owner` as what has the names.
        TypeError: these are no patterns.
    """
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{field} is {patterns!r}; needed are suffixes of names in a list.")
    matchers = {
        pattern: _whole_matcher(pattern) if isinstance(patterns, str) else _plain_matcher(pattern)
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    }
    found: set[str] = set()
    for pattern, matches in matchers.items():
        hits = {name for name in names if _any_level(name, matches)}
        if not hits:
            kind = "regular expression" if isinstance(patterns, str) else "suffix"
            raise ValueError(
                f"{field}: the {kind} {pattern!r} matches no {what} of {owner}; its parameters are "
                f"named like {_examples(names)}."
            )
        found |= hits
    return found


def _any_level(name: str, matches: Callable[[str], bool]) -> bool:
    """Whether `matches` holds for the parameter `name` or for any module around it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:length])) for length in range(len(parts) + 1))


def _plain_matcher(suffix: str) -> Callable[[str], bool]:
    return lambda name: name == suffix or name.endswith(f".{suffix}")


def _whole_matcher(pattern: str) -> Callable[[str], bool]:
    regex = compiled_regex(pattern)
    return lambda name: regex.fullmatch(name) is not None


def _suffix_matcher(pattern: str) -> Callable[[str], bool]:
    if not is_regex(pattern):
        return _plain_matcher(pattern)
    compiled_regex(pattern)
    return _whole_matcher(rf"(?:.*\.)?(?:{pattern})")


def compiled_regex(pattern: str) -> re.Pattern[str]:
    """`pattern` compiled.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a valid regular expression ({error}); for any text write '.*'."
        ) from error


def _linear_modules(model: nn.Module) -> set[str]:
    """Names of the linear maps but the output layer: the output embedding, else the whole head.

    The head of a transformers model is what lies outside its `base_model`.
    """
    from transformers.pytorch_utils import Conv1D

    inner, whole = unwrap(model), base_model(model)
    output = _output_embedding(inner)
    body = getattr(whole, "base_model", whole)
    inside = set(body.modules() if output is None and isinstance(body, nn.Module) else ())
    return {
        canonical_name(name)
        for name, module in inner.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and (module in inside if inside else module is not output)
    }


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    embedding = getter() if callable(getter) else None
    return embedding if isinstance(embedding, nn.Module) else None


def _examples(names: Iterable[str], count: int = 3) -> str:
    shown = list(names)
    return ", ".join(shown[:count]) + (", …" if len(shown) > count else "") if shown else "(none)"
