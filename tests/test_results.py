"""results.json: every damage is noticed, and every figure finds its place."""

import json
import logging
import os
import random

import numpy as np
import pytest

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report import read_outcomes, read_results, write_results
from hf_ewc.report.results import _sealed

NAN = float("nan")


def runs(name="a"):
    return {"EWC": [AccuracyMatrix([name, "b"], [[0.9, NAN], [0.5, 0.8]])]}


def sealed(path, content):
    """A results file with a right checksum, whatever its content."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(_sealed(text.removeprefix("{").encode()))
    return path


def test_there_and_back(tmp_path):
    path = write_results(tmp_path / "results.json", runs(), {"settings": {"é": [1, None, "x"]}})
    again, content = read_results(path)
    assert again == runs()
    assert content["settings"] == {"é": [1, None, "x"]}
    assert json.loads(path.read_text())["runs"] == content["runs"]


def test_every_flip_of_a_bit_is_noticed(tmp_path):
    path = write_results(tmp_path / "results.json", runs(), {"settings": {"seed": 1}})
    whole, chance = path.read_bytes(), random.Random(0)
    for bit in chance.sample(range(8 * len(whole)), 400):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="not a results file"):
            read_results(path)
    for cut in (0, 1, 40, 90, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a results file"):
            read_results(path)
    for more in (b" ", b"\n", whole):
        path.write_bytes(whole + more)
        with pytest.raises(ValueError, match="not a results file"):
            read_results(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"runs": {"EWC": [{}]}}', "\ufeff{}"])
def test_no_results_file(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="not a results file"):
        read_results(tmp_path / "results.json")


MATRIX = {"tasks": ["a"], "scores": [[0.5]]}


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"runs": 1}',
        '{"runs": []}',
        '{"runs": {}}',
        '{"runs": {"EWC": []}}',
        '{"runs": {"EWC": [[]]}}',
        '{"runs": {"EWC": 3}}',
        {"runs": {"EWC": [{**MATRIX, "scores": [["0.5"]]}]}},
        {"runs": {"EWC": [{**MATRIX, "scores": [[True]]}]}},
        {"runs": {"EWC": [{**MATRIX, "scores": [[0.5, 0.5]]}]}},
        {"runs": {"EWC": [{**MATRIX, "scores": [[10**400]]}]}},
        {"runs": {"EWC": [{**MATRIX, "scores": [[float("inf")]]}]}},
        {"runs": {"EWC": [{**MATRIX, "scores": [[NAN]]}]}},
        {"runs": {"EWC": [{**MATRIX, "tasks": "a"}]}},
        {"runs": {"EWC": [{**MATRIX, "tasks": [1]}]}},
        {"runs": {"EWC": [{**MATRIX, "tasks": []}]}},
        {"runs": {"EWC": [{**MATRIX, "seed": "0"}]}},
        {"runs": {"EWC": [{**MATRIX, "seconds": "long"}]}},
        {"runs": {"EWC": [{**MATRIX, "peak_memory": -1}]}},
        {"runs": {"EWC": [{**MATRIX, "importance": {"a": [1]}}]}},
        {"runs": {"EWC": [{**MATRIX, "importance": [1]}]}},
        {"runs": {"EWC": [{**MATRIX, "lower_is_better": {"c": "loss"}}]}},
        {"runs": {"EWC": [{**MATRIX, "lower_is_better": ["a"]}]}},
        {"runs": {"EWC": [{**MATRIX, "others": {"c": [1]}}]}},
        {"runs": {"EWC": [{**MATRIX, "seed": 1}, {**MATRIX, "seed": 1}]}},
        '{"runs": {"EWC": [{"tasks": ["a"], "scores": [[0.5]], "scores": [[0.6]]}]}}',
        '{"runs": {"EWC": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"runs": {"EWC": [{"tasks": ["a"], "scores": [[' + "1" * 5000 + "]]}]}}",
    ],
)
def test_what_is_whole_but_wrong(tmp_path, content):
    path = sealed(tmp_path / "results.json", {"runs": {"EWC": [MATRIX]}})
    assert read_results(path)[0]["EWC"][0]["a", "a"] == 0.5
    with pytest.raises(ValueError, match="not a results file"):
        read_outcomes(sealed(path, content))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(ValueError, match="no regular file"):
        read_results(tmp_path / "results.json")


def test_a_file_beyond_all_measure_is_not_read(tmp_path):
    with open(tmp_path / "results.json", "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(ValueError, match="at most"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    "figure",
    [
        float("inf"), float("-inf"), NAN, 10**400, -(10**400),
        np.float32("inf"), np.float64("nan"), 1 << 2000,
    ],
)  # fmt: skip
def test_a_figure_that_is_no_finite_number_is_kept_as_null(tmp_path, caplog, figure):
    details = {"metrics": [{"a": {"perplexity": figure, "loss": 0.5, "odd": [figure, 1]}}]}
    with caplog.at_level(logging.WARNING, logger="hf_ewc"):
        path = write_results(tmp_path / "results.json", runs(), details)
    (warning,) = caplog.messages
    assert "metrics[0].a.perplexity" in warning
    kept = read_results(path)[1]["metrics"][0]["a"]
    assert kept == {"perplexity": None, "loss": 0.5, "odd": [None, 1]}


def test_numbers_of_numpy_are_numbers(tmp_path):
    details = {"x": np.float32(0.5), "y": np.arange(3), "z": (np.int64(3), np.bool_(True))}
    content = read_results(write_results(tmp_path / "results.json", runs(), details))[1]
    assert [content[key] for key in "xyz"] == [0.5, [0, 1, 2], [3, True]]
    with pytest.raises(TypeError, match=r"cannot hold object at 'x\[0\]'"):
        write_results(tmp_path / "results.json", runs(), {"x": [object()]})


@pytest.mark.parametrize("name", ["a $x_{$ b", "\ud800", "\udfffx", "a\x00b", "\n", "|", "日本"])
def test_names_of_all_kinds_go_there_and_back(tmp_path, name):
    path = write_results(tmp_path / "results.json", runs(name))
    assert read_results(path)[0] == runs(name)
