"""The penalty on two processes: DDP, FSDP2 and DeepSpeed ZeRO-1, 2 and 3 (gloo, on the CPU)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import launch, torchrun

DDP = ["ddp", "ddp_unused", "ddp_static", "ddp_checkpoint", "ddp_checkpoint_reentrant"]


@pytest.mark.parametrize("case", [*DDP, "fsdp2", "zero1", "zero2", "zero3"])
def test_the_penalty_is_exact_and_logged_once(case: str, tmp_path: Path) -> None:
    command = [*torchrun(2), "-m", "tests.many_processes", case, str(tmp_path)]
    code, output = launch(*command, fresh=case == "ddp")
    assert code == 0, output[-6000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["error"] < 1e-5
    assert result["ewc_penalty"] == pytest.approx(result["penalty"], rel=1e-5)
    assert result["loss"] == pytest.approx(result["task_loss"] + result["penalty"], rel=1e-5)
    groups = [value for key, value in result.items() if key.startswith("ewc_penalty/")]
    assert sum(groups) == pytest.approx(result["penalty"], rel=1e-5)
    assert 0 < result["after"] < result["penalty"]
