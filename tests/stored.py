"""States to save, and what their folders hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_ewc import EWCState
from hf_ewc.state import storage
from hf_ewc.state.ewc_state import TaskRecord

RECORD = TaskRecord("digits | 1", 200, "exact", 0.5, "2026-11-24T03:00:00+00:00")


def make(value: float = 1.0, rows: int = 40, columns: int = 30) -> EWCState:
    """A state in which every number says which one it is."""
    torch.manual_seed(0)
    names = {"body.weight": (rows, columns), "body.bias": (rows,), "scale": ()}
    return EWCState(
        {name: torch.rand(shape) + value for name, shape in names.items()},
        {name: torch.randn(shape) + value for name, shape in names.items()},
        {"scale": value / 3},
        (RECORD,) * int(value),
        {"value": value, "note": "Übung", "list": [1, 2]},
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def tensor_file(folder: Path) -> Path:
    return folder / storage.tensor_file(folder)


# Damage


def refuse(folder: Path, message: str = "damaged") -> None:
    with pytest.raises(ValueError, match=message):
        EWCState.from_pretrained(folder)
