"""Each recipe runs, shortly, and ends with what it promises."""

import os
import subprocess
import sys
from pathlib import Path

from hf_ewc.report import read_results

ROOT = Path(__file__).parent.parent


def test_digits(tmp_path):
    command = [sys.executable, "recipes/digits_vit.py", "--num_seeds", "1", "--max_steps", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--use_cpu", "--output_dir", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs, _ = read_results(tmp_path / "results.json")
    methods = ["plain", "L2-SP", "replay", "EWC", "EWC + replay", "joint"]
    assert {method: [m.num_learnt for m in found] for method, found in runs.items()} == {
        method: [5] for method in methods
    }
    assert "average accuracy (ACC)" in done.stdout
    assert "EWC + replay, seed 42: 8-9 (5/5)" in done.stderr  # the progress bar
    assert "scripts/quickstart --ewc_mode online" in done.stdout
    for name in ("accuracy_matrix.png", "stability_plasticity.png", "report.md"):
        assert (tmp_path / name).exists()
