"""The accuracy matrix against values worked out by hand."""

import json
import math

import pytest

from hf_ewc.metrics import AccuracyMatrix

NAN = float("nan")

# Three tasks. After task 3: 0.5, 0.7, 0.9.
SCORES = [
    [0.8, 0.4, 0.2],
    [0.6, 0.9, 0.3],
    [0.5, 0.7, 0.9],
]
BASELINE = [0.1, 0.1, 0.2]
JOINT = [0.9, 0.95, 0.95]


def full() -> AccuracyMatrix:
    return AccuracyMatrix(["a", "b", "c"], SCORES, baseline=BASELINE, joint=JOINT)


def test_measures_by_hand():
    matrix = full()
    assert matrix.average_accuracy() == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert matrix.backward_transfer() == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert matrix.forward_transfer() == pytest.approx(((0.4 - 0.1) + (0.3 - 0.2)) / 2)
    assert matrix.forgetting() == pytest.approx(((0.8 - 0.5) + (0.9 - 0.7)) / 2)
    assert matrix.learning_accuracy() == pytest.approx((0.8 + 0.9 + 0.9) / 3)
    assert matrix.intransigence() == pytest.approx((0.1 + 0.05 + 0.05) / 3)


def test_after_an_earlier_task():
    matrix = full()
    assert matrix.average_accuracy(after=1) == pytest.approx((0.6 + 0.9) / 2)
    assert matrix.average_accuracy(after="b") == matrix.average_accuracy(after=1)
    assert matrix.backward_transfer(after=1) == pytest.approx(0.6 - 0.8)
    assert matrix.forgetting(after=1) == pytest.approx(0.8 - 0.6)
    assert matrix.learning_accuracy(after=0) == 0.8


def test_forgetting_counts_from_the_best_not_from_the_first():
    # Task a gets better while b is learnt: Chaudhry's forgetting starts from 0.9, BWT from 0.8.
    matrix = AccuracyMatrix(["a", "b", "c"], [[0.8, 0, 0], [0.9, 0.7, 0], [0.6, 0.7, 0.9]])
    assert matrix.forgetting() == pytest.approx(((0.9 - 0.6) + 0.0) / 2)
    assert matrix.backward_transfer() == pytest.approx(((0.6 - 0.8) + 0.0) / 2)


def test_entries_not_yet_seen():
    matrix = AccuracyMatrix(["a", "b", "c"])
    assert matrix.num_learnt == 0
    assert matrix.summary() == {}
    with pytest.raises(ValueError, match=r"no task has a score"):
        matrix.average_accuracy()
    matrix[0, 0] = 0.8
    assert matrix.num_learnt == 1
    assert matrix.average_accuracy() == 0.8
    assert math.isnan(matrix.forgetting())
    assert math.isnan(matrix.backward_transfer())
    matrix["b", "a"], matrix["b", "b"] = 0.6, 0.9
    assert matrix.forgetting() == pytest.approx(0.2)
    assert matrix.average_accuracy() == pytest.approx(0.75)
    assert matrix.summary() == pytest.approx(
        {
            "average_accuracy": 0.75,
            "backward_transfer": -0.2,
            "forgetting": 0.2,
            "learning_accuracy": 0.85,
        }
    )
    matrix["c", "c"] = 0.9
    with pytest.raises(ValueError, match=r"forgetting needs .*\(2, 0\), \(2, 1\)"):
        matrix.forgetting()


def test_what_is_missing_is_said():
    matrix = AccuracyMatrix(["a", "b"], [[0.8, NAN], [0.6, 0.9]])
    with pytest.raises(ValueError, match="baseline"):
        matrix.forward_transfer()
    with pytest.raises(ValueError, match="joint"):
        matrix.intransigence()
    matrix = AccuracyMatrix(["a", "b"], matrix.scores, baseline=[0.1, 0.1])
    with pytest.raises(ValueError, match=r"forward transfer needs .*\(0, 1\)"):
        matrix.forward_transfer()


def test_to_dict_and_back_through_json():
    matrix = AccuracyMatrix(["a", "b"], [[0.8, NAN], [0.6, 0.9]], baseline={"b": 0.2, "a": 0.1})
    text = json.dumps(matrix.to_dict(), allow_nan=False)
    again = AccuracyMatrix.from_dict(json.loads(text))
    assert again == matrix
    assert again["a", "a"] == 0.8
    assert math.isnan(again["a", "b"])
    assert again.baseline is not None
    assert list(again.baseline) == [0.1, 0.2]


def test_without_names():
    matrix = AccuracyMatrix(SCORES)
    assert matrix.tasks == ("task 1", "task 2", "task 3")
    assert matrix[2, 1] == 0.7
    assert matrix[-1, -1] == 0.9
    assert "0.7" in repr(matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "no tasks"),
        ((["a", "a"],), "name of its own"),
        ((["a", "b"], [[0.1, 0.2]]), r"shape \(1, 2\)"),
        ((["a", "b"], [[0.1, 0.2], [0.1]]), "scores must be numbers"),
        ((["a"], [[float("inf")]]), "infinite"),
        ((["a"], [["x"]]), "scores must be numbers"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix(*arguments)


def test_bad_entries():
    matrix = full()
    with pytest.raises(ValueError, match="finite"):
        matrix[0, 0] = NAN
    with pytest.raises(KeyError, match="no task is named 'd'"):
        matrix["d", "a"] = 0.1
    with pytest.raises(IndexError, match="there are 3"):
        matrix[0, 3] = 0.1
    with pytest.raises(ValueError, match="baseline is given for"):
        AccuracyMatrix(["a", "b"], baseline={"a": 0.1})
    with pytest.raises(ValueError, match="missing: scores"):
        AccuracyMatrix.from_dict({"tasks": ["a"]})
