"""EWC on the weights under an adapter on two processes that each hold a part of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import launch, torchrun


@pytest.mark.parametrize("case", ["fsdp2", "zero3"])
def test_parts_give_what_the_whole_gives(case: str, tmp_path: Path) -> None:
    command = [*torchrun(2), "-m", "tests.weight_space_processes", case, str(tmp_path)]
    code, output = launch(*command)
    assert code == 0, output[-6000:]
    errors = json.loads((tmp_path / "result.json").read_text())
    assert errors.keys() == {"fisher", "anchor", "value", "gradient"}
    assert max(errors.values()) < 1e-5, errors
