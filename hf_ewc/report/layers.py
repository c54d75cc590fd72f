"""Importance by layer: which parts of the model carry the old tasks."""

from __future__ import annotations

from collections.abc import Mapping

from hf_ewc.report.outcome import LayerImportance

MOST_LAYERS = 40


def layer_of(parameter: str) -> str:
    """The layer of a parameter: its name up to the first number, else two levels of modules.

    `bert.encoder.layer.3.output.dense.weight` is of `bert.encoder.layer.3`,
    `bert.embeddings.word_embeddings.weight` of `bert.embeddings`, `classifier.bias` of
    `classifier`.
    """
    levels = parameter.split(".")
    for i, level in enumerate(levels):
        if level.isdigit():
            return ".".join(levels[: i + 1])
    return ".".join(levels[:-1][:2]) or parameter


def by_layer(sums: Mapping[str, LayerImportance]) -> dict[str, LayerImportance]:
    """Sums by parameter, added up by layer, in the order in which layers first appear."""
    found: dict[str, LayerImportance] = {}
    for name, (total, parameters) in sums.items():
        before = found.get(layer_of(name), LayerImportance(0.0, 0))
        found[layer_of(name)] = LayerImportance(
            before.total + total, before.parameters + parameters
        )
    return found


def most_important(
    layers: Mapping[str, LayerImportance], most: int = MOST_LAYERS
) -> dict[str, LayerImportance]:
    """The layers that matter most, in the model's order, and all others as one."""
    if len(layers) <= most:
        return dict(layers)
    ranked = sorted(layers, key=lambda name: -layers[name].total)
    kept = set(ranked[: most - 1])
    others = [layer for name, layer in layers.items() if name not in kept]
    rest = LayerImportance(
        sum(layer.total for layer in others), sum(layer.parameters for layer in others)
    )
    return {name: layers[name] for name in layers if name in kept} | {f"{len(others)} others": rest}
