"""What holds for all recipes and their configurations; the first recipe runs, shortly."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ewc.report import read_results

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes/configs").glob("*/*.yaml"))
sys.path.insert(0, str(ROOT / "recipes"))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_configuration_opens_with_its_command_and_is_parsed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = path.read_text(encoding="utf-8").splitlines()[0]
    script, name = re.fullmatch(r"# accelerate launch (\S+) (\S+)", command).groups()
    assert ROOT / name == path
    assert Path(script).stem == path.parent.name
    own, args, *_ = importlib.import_module(path.parent.name).parsed([name, "--use_cpu"])
    assert any(name.startswith("plain") for name in own.methods)
    assert any("ewc_config" in settings for settings in own.methods.values())
    assert Path(args.output_dir).name == path.stem
    assert isinstance(args.learning_rate, float)
    for task in own.tasks:
        for kind in ("file", "folder"):
            for file in (getattr(task, f"{part}_{kind}", None) for part in ("train", "eval")):
                assert file is None or Path(file).exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_readme_has_the_command_of_each_configuration(path):
    readme = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") in readme
