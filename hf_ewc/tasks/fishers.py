"""What the Fisher of each task was, for results.json and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_ewc.report.names import in_markdown
from hf_ewc.report.tables import table
from hf_ewc.state.ewc_state import EWCState


def fishers_of(state: EWCState) -> list[dict[str, Any]]:
    """Name, examples, type, Σ F and confidence of each task; no dates, which change by the run."""
    return [
        {
            "task": task.name,
            "examples": task.num_examples,
            "fisher_type": task.fisher_type,
            "trace": task.fisher_trace,
            "confidence": task.confidence,
        }
        for task in state.tasks
    ]


def fisher_table(fishers: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of them."""
    rows = [
        [
            in_markdown(found["task"]),
            str(found["examples"]),
            found["fisher_type"],
            _figure(found["trace"], ".3g"),
            _figure(found.get("confidence"), ".3f"),
        ]
        for found in fishers
    ]
    return table(["task", "examples", "Fisher", "trace Σ F", "confidence"], rows)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
