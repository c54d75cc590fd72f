"""`hf-ewc inspect`: show the tasks of a state, its size, and its importance by layer."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_ewc.report.names import in_markdown
from hf_ewc.report.tables import table

EXAMPLES = """
STATE is a folder with `ewc_state.json`, such as a model saved by EWCTrainer, or a Hub id.

examples:
  hf-ewc inspect runs/model/ewc
  hf-ewc inspect runs/model --json | jq .layers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", metavar="STATE", help="folder or Hub id of a state")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(given: argparse.Namespace) -> None:
    """Print what the state holds."""
    from hf_ewc.state import EWCState

    found = described(EWCState.from_pretrained(given.state))
    print(json.dumps(found, indent=2) if given.json else in_words(found))


def described(state: Any) -> dict[str, Any]:
    """Tasks, sizes, λ that it tells, and Σ F by layer, in JSON's types."""
    from dataclasses import asdict

    from hf_ewc.state.by_layer import importance_by_layer

    layers = importance_by_layer(state) or {}
    total = sum(layer.total for layer in layers.values())
    return {
        "tasks": [asdict(task) for task in state.tasks],
        "parameters": sum(layer.parameters for layer in layers.values()),
        "tensors": len(state.importance),
        "bytes": state.nbytes,
        "offset": state.offset,
        "told_lambda": state.told_lambda() if len(state.importance) else None,
        "layers": {
            name: {
                "importance": layer.total,
                "share": layer.total / total if total else 0.0,
                "parameters": layer.parameters,
                "mean": layer.total / layer.parameters,
            }
            for name, layer in layers.items()
        },
    }


def in_words(found: dict[str, Any]) -> str:
    """Two tables, a line on the size, and one on λ."""
    head = (
        f"{len(found['tasks'])} tasks, {found['parameters']:,} parameters in {found['tensors']} "
        f"tensors, {found['bytes'] / 2**20:.1f} MiB, offset {found['offset']:.4g}"
    )
    parts = [head, _told(found["told_lambda"]), _tasks(found["tasks"]), _layers(found["layers"])]
    return "\n\n".join(part for part in parts if part)


def _told(ewc_lambda: float | None) -> str:
    if ewc_lambda is None:
        return ""
    return f"λ that an untouched EWCConfig() takes with it (ewc_lambda='state'): {ewc_lambda:g}"


def _tasks(tasks: list[dict[str, Any]]) -> str:
    rows = [
        [in_markdown(t["name"]), str(t["num_examples"]), t["fisher_type"], f"{t['weight']:g}",
         _number(t["fisher_trace"]), _number(t["confidence"]), _number(t["ewc_lambda"]), t["date"]]
        for t in tasks
    ]  # fmt: skip
    header = ["task", "examples", "Fisher", "weight", "trace", "confidence", "learnt with λ",
              "consolidated"]  # fmt: skip
    return table(header, rows) if rows else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _layers(layers: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, f"{layer['parameters']:,}", f"{layer['importance']:.4g}",
         f"{100 * layer['share']:.1f} %", f"{layer['mean']:.3g}"]
        for name, layer in layers.items()
    ]  # fmt: skip
    header = ["layer", "parameters", "importance Σ F", "share", "mean"]
    return table(header, rows) if rows else ""
