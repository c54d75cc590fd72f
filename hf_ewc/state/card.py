"""The section on a state in a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import ModelCard

CARD_TAG = "ewc"
_BEGIN, _END = "<!-- hf-ewc: begin -->", "<!-- hf-ewc: end -->"


def card_section(tasks: Sequence[Mapping[str, Any]], facts: Mapping[str, object]) -> str:
    """A Markdown section: the facts as a list, the tasks as a table."""
    lines = [
        "## Elastic Weight Consolidation",
        "",
        "This repository holds the state of [EWC](https://arxiv.org/abs/1612.00796), written by",
        "`hf-ewc`: what keeps further fine-tuning from forgetting the tasks below.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    if tasks:
        lines += ["| task | examples | Fisher | weight | consolidated |", "|---|---|---|---|---|"]
        columns = ("name", "num_examples", "fisher_type", "weight", "date")
        for task in tasks:
            cells = [str(task[column]).replace("|", "\\|") for column in columns]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).rstrip() + "\n"


def section_of(
    shapes: Mapping[str, torch.Size],
    nbytes: int,
    tasks: Sequence[Mapping[str, Any]],
    settings: Mapping[str, object],
) -> str:
    """The section on a state of parameters of these shapes that takes so many bytes."""
    size = sum(shape.numel() for shape in shapes.values())
    facts = {
        "Protected": f"{size:,} parameters in {len(shapes)} tensors",
        "Size": f"{nbytes / 2**20:.1f} MiB",
    }
    return card_section(tasks, {**facts, **settings})


def with_section(card: str | None, section: str) -> str:
    """The model card `card` (None: a new one) with the tag `ewc` and this section, once."""
    marked = f"{_BEGIN}\n{section.strip()}\n{_END}"
    present = ModelCard(card or "---\nlibrary_name: hf-ewc\n---\n", ignore_metadata_errors=True)
    tags = list(present.data.get("tags") or [])
    present.data["tags"] = tags if CARD_TAG in tags else [*tags, CARD_TAG]
    before, begin, rest = present.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin else ""
    parts = [part.strip("\n") for part in (before, marked, after)]
    present.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"
    return str(present)
