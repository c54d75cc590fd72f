"""Tables, plots and files; what they hold is checked, not how they look."""

import json
import os

import numpy as np
import pytest

from hf_ewc.files import write_atomically
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report import mean_scores, read_results, score_table, summary_table, write_report

NAN = float("nan")


def runs():
    return {
        "plain": [
            AccuracyMatrix(["a", "b"], [[0.9, NAN], [0.5, 0.8]]),
            AccuracyMatrix(["a", "b"], [[0.7, NAN], [0.3, 0.8]]),
        ],
        "EWC": [
            AccuracyMatrix(["a", "b"], [[0.9, NAN], [0.9, 0.7]]),
            AccuracyMatrix(["a", "b"], [[0.7, NAN], [0.7, 0.7]]),
        ],
    }


def test_mean_and_spread_over_seeds():
    mean, spread = mean_scores(runs()["plain"])
    np.testing.assert_allclose(mean, [[0.8, NAN], [0.4, 0.8]])
    # The deviation of two values with n - 1 is their distance over the root of two.
    np.testing.assert_allclose(spread, [[0.2 / 2**0.5, NAN], [0.2 / 2**0.5, 0]], atol=1e-12)


def test_tables():
    assert score_table(runs()["plain"]).splitlines() == [
        "| score on |             a |             b |",
        "| -------- | ------------: | ------------: |",
        "| after a  | 0.800 ± 0.141 |               |",
        "| after b  | 0.400 ± 0.141 | 0.800 ± 0.000 |",
    ]
    plain, ewc = summary_table(runs()).splitlines()[2:]
    assert plain.split("|")[1:-1] != ewc.split("|")[1:-1]
    assert [cell.strip() for cell in plain.split("|")[1:-1]] == [
        "plain",
        "0.600 ± 0.071",
        "-0.400 ± 0.000",
        "0.400 ± 0.000",
        "0.800 ± 0.071",
    ]


def test_a_table_of_one_run_has_no_spread():
    assert "±" not in score_table(runs()["EWC"][:1])


def test_report_files(tmp_path):
    path = write_report(
        tmp_path / "new" / "folder", runs(), title="T", notes=["Note."], details={"x": 1}
    )
    folder = path.parent
    assert sorted(os.listdir(folder)) == [
        "accuracy_matrix.png",
        "curves.png",
        "report.md",
        "results.json",
    ]
    for name in ("accuracy_matrix.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert report.startswith("# T\n\nNote.\n")
    assert score_table(runs()["EWC"]) in report
    assert "over 2 seeds" in report
    again, content = read_results(path)
    assert again == runs()
    assert content["x"] == 1
    assert content["summary"]["EWC"]["forgetting"] == pytest.approx({"mean": 0, "std": 0})


def test_a_run_that_has_only_begun(tmp_path):
    path = write_report(tmp_path, {"EWC": [AccuracyMatrix(["a", "b"], [[0.9, NAN], [NAN, NAN]])]})
    assert json.loads(path.read_text())["runs"]["EWC"][0]["scores"] == [[0.9, None], [None, None]]


def test_scores_other_than_accuracies(tmp_path):
    write_report(tmp_path, {"EWC": [AccuracyMatrix(["a", "b"], [[-3.0, NAN], [-4.0, -2.5]])]})
    write_report(tmp_path, {"EWC": [AccuracyMatrix(["a", "b"], [[-3.0, NAN], [NAN, NAN]])]})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"runs": {"EWC": [{}]}}'])
def test_a_damaged_results_file(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="not a results file"):
        read_results(tmp_path / "results.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
