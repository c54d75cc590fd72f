"""The penalty on two processes: DDP, FSDP2 and DeepSpeed ZeRO-1, 2 and 3 (gloo, on the CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", ["ddp", "ddp_unused", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_penalty_is_exact_and_logged_once(case: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, "-m", "tests.many_processes", case, str(tmp_path)],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",
            "DS_IGNORE_CUDA_DETECTION": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["error"] < 1e-5
    assert result["ewc_penalty"] == pytest.approx(result["penalty"], rel=1e-5)
    assert result["loss"] == pytest.approx(result["task_loss"] + result["penalty"], rel=1e-5)
    groups = [value for key, value in result.items() if key.startswith("ewc_penalty/")]
    assert sum(groups) == pytest.approx(result["penalty"], rel=1e-5)
    assert 0 < result["after"] < result["penalty"]
