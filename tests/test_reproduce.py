"""The scripts that make the tables again: each is whole, and two run on data made on the spot."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
TABLES = sorted(
    path.stem for path in (ROOT / "scripts/tables").glob("*.py") if "__main__" in path.read_text()
)


@pytest.fixture
def imported(monkeypatch):
    """A module of the tables by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts/tables"))
    return importlib.import_module


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_its_command(name, imported):
    module = imported(name)
    assert callable(module.main)
    assert f"scripts/reproduce {name} " in module.__doc__


def test_the_command_lists_the_tables():
    done = subprocess.run(
        [str(ROOT / "scripts/reproduce"), "mnist"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.split()[-len(TABLES) :] == TABLES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with forty images, of which four test each digit's."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    labels = np.arange(80) % 10
    pixels = np.random.default_rng(0).integers(0, 255, (80, 28, 28), dtype=np.uint8)
    np.savez(
        folder / "mnist/data.npz",
        x_train=pixels[:40], y_train=labels[:40], x_test=pixels[40:], y_test=labels[40:],
    )  # fmt: skip
    return folder


def output_of(name, data, folder, *options):
    command = [sys.executable, f"scripts/tables/{name}.py", "--data", str(data), *options]
    done = subprocess.run(
        [*command, "--max_steps", "2", "--output_dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_published_table(data, tmp_path):
    printed = output_of("split_mnist", data, tmp_path, "--only", "none", "batched", "--seeds", "2")
    assert [re.findall(f"^\\| {name} ", printed, re.M) for name in ("none", "batched")] == [
        ["| none "] * 2,
        ["| batched "] * 2,
    ]
    assert "After 2 seeds" in printed
    assert "Published ACC: none 85.41" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"order-0", "order-1"}


def test_an_unknown_name_is_refused(imported):
    options = imported("options").TableOptions(only=["precise"])
    with pytest.raises(ValueError, match=r"--only \['precise'\]: there are none, exact\."):
        options.among(["none", "exact"])


def test_what_is_lost_to_the_best(imported):
    shown = imported("choosing_lambda").shown(
        {"digits": {"plain": [0.5, 0.7], "1e3": [0.8, 0.9], "1e4": [0.9, 0.94]}}
    )
    levels, losses = re.findall(r"^\| digits.*", shown, re.M)
    assert [cell.strip() for cell in levels.split("|")[1:-1]] == [
        "digits (2 seeds)", "0.600 ± 0.100", "0.850 ± 0.050", "**0.920 ± 0.020**",
    ]  # fmt: skip
    assert [cell.strip() for cell in losses.split("|")[1:-1]] == [
        "digits: 1e4", "0.320", "0.070", "0.000",
    ]  # fmt: skip


def test_the_fisher_of_unseen_data_is_of_what_is_kept_out(imported):
    task = imported("hf_ewc").Task("one", list(range(20)), None)
    seen, unseen = (imported("fisher_data").with_fisher_data(task, kind) for kind in (False, True))
    assert sorted(seen.train_dataset) == sorted(unseen.train_dataset)
    assert len(seen.fisher_dataset) == len(unseen.fisher_dataset) == 4
    assert set(seen.fisher_dataset) < set(seen.train_dataset)
    assert set(unseen.fisher_dataset) == set(range(20)) - set(unseen.train_dataset)


def test_permuted_images_are_the_same_in_another_order(imported, data):
    train, test = imported("sources").images("mnist", data)
    task = imported("sequences").permuted(train, test, 3, most=8)
    first, other = train[5]["pixel_values"], task.train_dataset[5]["pixel_values"]
    assert not first.equal(other)
    assert first.sort().values.equal(other.sort().values)
    assert len(task.eval_dataset) == 8


def test_settings_are_chosen_without_the_test_data(imported, monkeypatch, tmp_path):
    sequences, options = imported("sequences"), imported("options")
    found = options.parsed("some", ["--validation", "--seeds", "2", "--output_dir", str(tmp_path)])
    assert [*found.repetitions] == [100, 101]
    assert found.output_dir == f"{tmp_path}/validation"
    task = imported("hf_ewc").Task("one", list(range(20)), ["test"])
    sequence = sequences.TaskSequence("some", [task], None, {}, ())
    asked = []
    monkeypatch.setattr(sequences, "compare_methods", lambda *given, **more: asked.append(given))
    sequence.compared({}, tmp_path, found)
    sequence.compared({}, tmp_path, options.TableOptions())
    chosen, shown = (tasks[0] for _, tasks, *_ in asked)
    assert len(chosen.eval_dataset) == 4
    assert sorted([*chosen.train_dataset, *chosen.eval_dataset]) == list(range(20))
    assert shown is task


def test_curves_show_means_and_levels(imported):
    curves = imported("curves")
    panel = curves.Panel(
        "digits", "λ", {"λ fixed": {10.0: [0.5, 0.7], 100.0: [0.8, 0.8]}}, {"plain": [0.2, 0.4]}
    )
    (axis,) = curves.figure_of([panel]).axes
    fixed, plain = axis.containers[0].lines[0], axis.lines[-1]
    assert fixed.get_xdata().tolist() == [10.0, 100.0]
    assert fixed.get_ydata().tolist() == pytest.approx([0.6, 0.8])
    (bars,) = axis.containers[0].lines[2]
    assert [np.ptp(ends[:, 1]) / 2 for ends in bars.get_segments()] == pytest.approx([0.1, 0.0])
    assert list(plain.get_ydata()) == pytest.approx([0.3, 0.3])
    assert axis.get_xscale() == "log"


def test_a_curve_over_lambda_has_the_fixed_ones_in_order(imported, monkeypatch):
    curves = imported("curves")
    scores = {"plain": [0.1], "1e4": [0.3], "3e2": [0.2], "auto": [0.4], "falling": [0.5]}
    monkeypatch.setattr(curves, "accuracies", lambda runs: runs)
    panel = curves.over_lambda("digits", scores)
    assert panel.lines == {"λ": {300.0: [0.2], 10000.0: [0.3]}}
    assert [*panel.lines["λ"]] == [300.0, 10000.0]
    assert panel.levels == {"plain": [0.1]}


def test_images_in_a_frame(imported, data):
    (train, _), framed = imported("sources").images("mnist", data), imported("scenarios").framed
    pixels = framed(train).pixels.view(-1, 32, 32)
    assert pixels[:, 2:-2, 2:-2].flatten(1).allclose((train.pixels - 0.1) / 0.2752)
    assert pixels[:, :2].unique().tolist() == pytest.approx([-0.1 / 0.2752])
