"""Tables, statistics and the report's files."""

import logging
import mmap
import os

import numpy as np
import pytest

from hf_ewc.files import write_atomically
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report import (
    LayerImportance,
    Outcome,
    difference_table,
    mean_scores,
    measured,
    read_outcomes,
    read_results,
    score_table,
    summary_table,
    write_report,
)
from hf_ewc.report.importance import _shares
from hf_ewc.report.layers import by_layer, layer_of, most_important
from hf_ewc.report.writing import markdown

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
    # The standard error of the mean of two values is half their distance.
    np.testing.assert_allclose(spread, [[0.1, NAN], [0.1, 0]], atol=1e-12)


def test_tables():
    assert score_table(runs()["plain"]).splitlines() == [
        "| score on |             a |             b |",
        "| -------- | ------------: | ------------: |",
        "| after a  | 0.800 ± 0.100 |               |",
        "| after b  | 0.400 ± 0.100 | 0.800 ± 0.000 |",
    ]
    plain, ewc = summary_table(runs()).splitlines()[2:]
    assert plain.split("|")[1:-1] != ewc.split("|")[1:-1]
    assert [cell.strip() for cell in plain.split("|")[1:-1]] == [
        "plain",
        "0.600 ± 0.050",
        "-0.400 ± 0.000",
        "0.400 ± 0.000",
        "0.800 ± 0.050",
    ]


def test_a_table_of_one_run_has_no_spread():
    assert "±" not in score_table(runs()["EWC"][:1])


def test_report_files(tmp_path):
    path = write_report(
        tmp_path / "new" / "folder", runs(), title="T", notes=["Note."], details={"x": 1}
    )
    folder = path.parent
    pictures = ["accuracy_matrix.png", "curves.png", "stability_plasticity.png"]
    assert sorted(os.listdir(folder)) == [*pictures[:2], "report.md", "results.json", pictures[2]]
    report = (folder / "report.md").read_text()
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in report
    assert report.startswith("# T\n\nNote.\n")
    assert score_table(runs()["EWC"]) in report
    assert "standard error over 2 seeds" in report
    again, content = read_results(path)
    assert again == runs()
    assert content["x"] == 1
    assert content["summary"]["EWC"]["forgetting"] == pytest.approx({"mean": 0, "std": 0})


def test_differences_are_taken_seed_by_seed(tmp_path):
    # ACC of plain: 0.65 and 0.55, of EWC: 0.80 and 0.70; the difference is 0.15 with each seed.
    found = [cell.strip() for cell in difference_table(runs()).splitlines()[2].split("|")[1:-1]]
    assert found == ["EWC", "+0.150 ± 0.000", "+0.400 ± 0.000", "-0.400 ± 0.000", "-0.050 ± 0.000"]
    content = read_results(write_report(tmp_path, runs()))[1]
    expected = {"mean": 0.15, "standard_error": 0, "seeds": 2}
    assert content["differences"]["EWC"]["average_accuracy"] == pytest.approx(expected)
    assert "plain" not in content["differences"]


def test_only_the_seeds_that_both_ran_with_are_compared():
    plain, ewc = (dict(zip((3, 7), repeats, strict=True)) for repeats in runs().values())
    table = difference_table({"plain": plain, "EWC": {7: ewc[7], 8: ewc[3]}})
    assert "+0.150" in table
    assert "±" not in table
    assert difference_table({"plain": plain}) == difference_table({"a": plain, "b": ewc}) == ""


def test_seconds_memory_and_importance_go_there_and_back(tmp_path):
    layers = {"layer.0": LayerImportance(0.5, 12), "classifier": LayerImportance(1.5, 4)}
    given = {
        "plain": {5: Outcome(runs()["plain"][0], seconds=2.0, peak_memory=3 << 20)},
        "EWC": {5: Outcome(runs()["EWC"][0], seconds=4.0, peak_memory=5 << 20, importance=layers)},
    }
    path = write_report(tmp_path, given)
    assert read_outcomes(path)[0] == given
    report = (tmp_path / "report.md").read_text()
    assert "| EWC   |           4.0 |                 5 |     5 |" in report
    assert (tmp_path / "importance.png").exists()
    assert "(importance.png)" in report


def test_what_a_run_ran_on_is_kept(tmp_path):
    content = read_results(write_report(tmp_path, runs()))[1]
    assert set(content["environment"]) == {"versions", "hardware", "commit"}
    assert content["environment"]["versions"]["torch"]
    assert content["environment"]["hardware"]["cpu_cores"] == os.cpu_count()
    assert content["environment"]["versions"]["torch"] in (tmp_path / "report.md").read_text()


def test_measured_tells_seconds_and_the_most_memory_held():
    with measured() as small:
        pass
    # New pages, which a heap may have from before.
    with measured() as cost, mmap.mmap(-1, 64 << 20) as held:
        held.write(b"1" * len(held))
    assert cost.seconds > small.seconds > 0
    if cost.peak_memory is not None:
        assert cost.peak_memory - small.peak_memory > 32 << 20  # of 64 MiB
        with measured() as after:
            pass
        assert after.peak_memory < cost.peak_memory - (32 << 20)
    total = cost + small
    assert (total.seconds, total.peak_memory) == (cost.seconds + small.seconds, cost.peak_memory)


def lower():
    scores = [[-3.0, NAN], [-5.0, -2.0]]
    return AccuracyMatrix(["a", "b"], scores, lower_is_better={"a": "loss", "b": "loss"})


def test_where_lower_is_better_the_figure_is_shown(tmp_path):
    table = score_table([lower()])
    assert "a ↓" in table
    assert "-3.000" not in table
    assert "3.000" in table
    summary = summary_table({"EWC": [lower()]})
    assert "average loss ↓" in summary
    assert "3.500" in summary  # the average of 5 and 2
    assert "-2.000" in summary  # BWT, below 0 where tasks were forgotten
    path = write_report(tmp_path, {"EWC": [lower()]})
    assert read_results(path)[0]["EWC"] == [lower()]
    assert read_results(path)[1]["runs"]["EWC"][0]["scores"] == [[3.0, None], [5.0, 2.0]]


def test_levels_over_figures_of_both_kinds_are_not_averaged():
    matrix = AccuracyMatrix(["a", "b"], [[-3.0, NAN], [-5.0, 0.9]], lower_is_better={"a": "loss"})
    table = summary_table({"EWC": [matrix]})
    assert "average" not in table
    assert "forgetting" in table
    assert [cell.strip() for cell in score_table([matrix]).splitlines()[3].split("|")[2:-1]] == [
        "5.000",
        "0.900",
    ]


def test_what_is_only_evaluated_stands_behind_the_tasks(tmp_path):
    matrix = AccuracyMatrix(
        ["a", "b"],
        [[0.9, NAN], [0.5, 0.8]],
        others={"general text": [-20.0, -30.0, -40.0]},
        lower_is_better={"general text": "perplexity"},
    )
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in score_table([matrix]).splitlines()]
    assert rows[0] == ["score on", "a", "b", "general text ↓"]
    assert rows[2:] == [
        ["before", "", "", "20.000"],
        ["after a", "0.900", "", "30.000"],
        ["after b", "0.500", "0.800", "40.000"],
    ]
    assert read_results(write_report(tmp_path, {"EWC": [matrix]}))[0]["EWC"] == [matrix]


def many(size, name="task {}"):
    scores = np.tril(np.full((size, size), 0.5)) + np.triu(np.full((size, size), NAN), 1)
    return AccuracyMatrix([name.format(i) for i in range(size)], scores)


def test_a_table_is_as_wide_as_can_be_read():
    long = score_table([many(4, "a rather long name of some forty characters {}")]).splitlines()
    assert [cell.strip() for cell in long[0].split("|")[2:-1]] == ["1", "2", "3", "4"]
    assert "after 4. a rather long name of some forty characters 3" in long[-1]
    rows = score_table([many(100)]).splitlines()
    assert len(rows) == 102
    assert max(map(len, rows)) < 60


@pytest.mark.parametrize("name", ["a|b", "*a*", "`a`", "<b>", "$x$", "[a](b)", "a\\", "a\nb"])
def test_names_are_text_in_tables(name):
    matrix = AccuracyMatrix([name, "b"], [[0.9, NAN], [0.5, 0.8]])
    lines = score_table([matrix]).splitlines()
    assert len(lines) == 4
    plain = lines[0].replace("\\|", "").replace("\\\\", "")
    assert plain.count("|") == 4
    assert all(f"\\{c}" in lines[0] for c in name if c in "|*`<$[\\")


def test_results_are_there_though_nothing_else_can_be_made(tmp_path, monkeypatch, caplog):
    write_report(tmp_path, runs())

    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr("hf_ewc.report.pictures.draw", fail)
    monkeypatch.setattr("hf_ewc.report.writing.markdown", fail)
    with caplog.at_level(logging.WARNING, logger="hf_ewc"):
        write_report(tmp_path, {"plain": runs()["plain"]})
    assert sorted(os.listdir(tmp_path)) == ["results.json", "stability_plasticity.png"]
    assert list(read_results(tmp_path / "results.json")[0]) == ["plain"]
    assert len([r for r in caplog.records if "no ink" in r.message]) == 3


def test_a_run_that_has_only_begun(tmp_path):
    path = write_report(tmp_path, {"EWC": [AccuracyMatrix(["a", "b"], [[0.9, NAN], [NAN, NAN]])]})
    assert read_results(path)[1]["runs"]["EWC"][0]["scores"] == [[0.9, None], [None, None]]
    write_report(tmp_path, {"plain": [AccuracyMatrix(["a"])], "EWC": [AccuracyMatrix(["a"])]})


def test_scores_other_than_accuracies(tmp_path):
    write_report(tmp_path, {"EWC": [AccuracyMatrix(["a", "b"], [[-3.0, NAN], [-4.0, -2.5]])]})
    write_report(tmp_path, {"EWC": [AccuracyMatrix(["a", "b"], [[-3.0, NAN], [NAN, NAN]])]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none of any"),
        ({"a": []}, r"none of \['a'\]"),
        ({"a": [many(1)], "b": [many(2)]}, "different tasks"),
    ],
)
def test_runs_that_make_no_report(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, given)
    with pytest.raises(ValueError, match=message):
        markdown(given)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("bert.encoder.layer.3.output.dense.weight", "bert.encoder.layer.3"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings"),
        ("classifier.bias", "classifier"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.11.self_attn.q_proj.lora_A.weight", "model.layers.11"),
        ("weight", "weight"),
    ],
)
def test_the_layer_of_a_parameter(parameter, layer):
    assert layer_of(parameter) == layer


def test_importance_by_layer_adds_up():
    sums = {
        f"h.{i % 60}.{n}": LayerImportance(float(i), 2) for i in range(120) for n in "ab"[i // 60]
    }
    layers = by_layer(sums)
    assert layers["h.3"] == LayerImportance(3.0 + 63.0, 4)
    shown = most_important(layers)
    assert len(shown) == 40
    assert "h.59" in shown
    assert "21 others" in shown
    assert sum(x.total for x in shown.values()) == sum(x.total for x in sums.values())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_picture_of_importance_shows_the_mean_share_over_seeds():
    def outcome(a, b):
        layers = {"a": LayerImportance(a, 1), "b": LayerImportance(b, 1)}
        return Outcome(many(1), importance=layers)

    repeats = {0: outcome(1.0, 3.0), 1: outcome(30.0, 10.0), 2: Outcome(many(1))}
    assert _shares(repeats, 40) == pytest.approx({"a": 50.0, "b": 50.0})
    assert _shares({2: Outcome(many(1))}, 40) == {}


def test_a_report_needs_no_working_directory(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    path = write_report(tmp_path / "run", {"EWC": runs()["EWC"]})
    assert read_results(path)[1]["environment"]["commit"] is None
