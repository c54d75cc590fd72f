"""The benchmarks run, at their smallest, and write what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("step", ["--small", "--turns", "1", "--steps", "2"], "training_ratios"),
        ("tasks", ["--turns", "1", "--epochs", "0.1"], "turns"),
        ("state", [], "forms"),
    ],
)
def test_a_benchmark_runs(name, options, part, tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, f"scripts/benchmark_{name}.py", *options, "--out", str(figures)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())[part]
