"""What the Fisher of each task was, for results.json and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_ewc.report.names import in_markdown
from hf_ewc.report.tables import table
from hf_ewc.state.ewc_state import EWCState


def fishers_of(state: EWCState) -> list[dict[str, Any]]:
    """Name, examples, type and Σ F of each task; no dates, which differ from run to run."""
    return [
        {
            "task": task.name,
            "examples": task.num_examples,
            "fisher_type": task.fisher_type,
            "trace": task.fisher_trace,
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
            "" if found["trace"] is None else f"{found['trace']:.3g}",
        ]
        for found in fishers
    ]
    return table(["task", "examples", "Fisher", "trace Σ F"], rows)
