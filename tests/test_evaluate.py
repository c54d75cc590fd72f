"""The measures as a module of `evaluate`, and metrics by name, both without the network."""

import math
import textwrap

import evaluate
import numpy as np
import pytest
from test_tasks import two_tasks, vit
from transformers import EvalPrediction, Seq2SeqTrainingArguments

from hf_ewc import AccuracyMatrix, run_tasks
from hf_ewc.metrics import continual_learning
from hf_ewc.tasks.named_metrics import NamedMetrics, decided


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    """No network; and what `evaluate` writes goes with the test."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)


def measures():
    return evaluate.load(continual_learning.__file__, keep_in_memory=True)


def test_the_measures_are_those_of_the_matrix():
    scores = [[0.8, 0.4, 0.2], [0.6, 0.9, 0.3], [0.5, 0.7, 0.9]]
    options = dict(baseline=[0.1, 0.1, 0.2], joint=[0.9, 0.95, 0.95])
    found = measures().compute(scores=scores, **options)
    assert found == pytest.approx(AccuracyMatrix(scores, **options).summary())
    assert found["average_accuracy"] == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert found["forgetting"] == pytest.approx((0.3 + 0.2) / 2)
    assert set(found) >= {"forward_transfer", "intransigence", "backward_transfer"}


@pytest.mark.parametrize("none", [None, math.nan])
def test_entries_that_were_not_measured(none):
    found = measures().compute(scores=[[0.9, none], [0.5, 0.8]])
    assert found["backward_transfer"] == pytest.approx(-0.4)
    assert "forward_transfer" not in found
    assert found == measures().compute(scores=[[0.9], [0.5, 0.8]])
    assert measures().compute(scores=[[0.9], [0.5, 0.8]], after=0)["average_accuracy"] == 0.9
    named = measures().compute(scores=[[0.9], [0.5, 0.8]], tasks=["a", "b"], after="a")
    assert named["average_accuracy"] == 0.9


def test_rows_can_be_added_one_by_one():
    module = measures()
    for row in ([0.9], [0.5, 0.8]):
        module.add_batch(scores=[row])
    assert module.compute()["forgetting"] == pytest.approx(0.4)


def test_rows_that_are_too_long():
    with pytest.raises(ValueError, match="row 0 has 2 scores for 1 tasks"):
        measures().compute(scores=[[0.9, 0.5]])


SCRIPT = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        value = datasets.Value("{dtype}")
        features = datasets.Features({{"predictions": value, "references": value}})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        return {{"{name}": {figure}}}
"""


@pytest.fixture
def script(tmp_path):
    def written(name, figure, dtype="int64"):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(SCRIPT).format(name=name, figure=figure, dtype=dtype))
        return str(path)

    return written


def test_metrics_by_name(script):
    same = "sum(p == r for p, r in zip(predictions, references))"
    names = [script("hits", same), script("count", "len(references)")]
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]])
    prediction = EvalPrediction((logits, None), np.array([0, 1, 1, -100]))
    assert NamedMetrics(names)(prediction) == {"hits": 2, "count": 3}
    assert NamedMetrics(names[0])(prediction) == {"hits": 2}
    beside = NamedMetrics(names[1], beside=lambda p: {"accuracy": 0.5})
    assert beside(prediction) == {"accuracy": 0.5, "count": 3}
    assert beside.__qualname__ == f"evaluate: {names[1]}"


def test_positions_are_shifted_for_causal_language_models(script):
    name = script("pairs", "str(list(zip(map(int, predictions), map(int, references))))")
    logits = np.eye(4)[[[2, 3, 1]]]  # predicts 2 for position 1, 3 for position 2
    prediction = EvalPrediction(logits, np.array([[0, 2, -100]]))
    assert NamedMetrics(name, shifted=True)(prediction) == {"pairs": "[(2, 2)]"}
    assert NamedMetrics(name)(prediction) == {"pairs": "[(2, 0), (3, 2)]"}


def test_real_labels_are_compared_with_the_outputs(script):
    name = script("error", "sum(abs(p - r) for p, r in zip(predictions, references))", "float64")
    prediction = EvalPrediction(np.array([[0.5], [2.0]]), np.array([1.0, 2.0]))
    assert NamedMetrics(name)(prediction) == {"error": 0.5}


@pytest.mark.parametrize("name", ["no_such_metric", "somebody/no_such_metric", "/no/such/path"])
def test_a_name_that_is_not_known(name):
    with pytest.raises(ValueError, match=f"compute_metrics names '{name}'.*give another name"):
        NamedMetrics(["no", name][1:])


def test_a_metric_that_does_not_fit(script):
    name = script("broken", "1 / 0")
    with pytest.raises(ValueError, match=r"broken.py' cannot be computed here \(division by zero"):
        NamedMetrics(name)(EvalPrediction(np.eye(2), np.array([0, 1])))
    with pytest.raises(ValueError, match=r"shape \(3,\), outputs \(2, 2\)"):
        NamedMetrics(name)(EvalPrediction(np.eye(2), np.array([0, 1, 1])))


@pytest.mark.parametrize(
    ("outputs", "labels", "shifted", "expected"),
    [
        ([[1, 2, 0]], [[1, -100, 2]], False, ([1, 0], [1, 2])),  # classes of tokens already
        ([[1, 2, 0]], [[-100, 1, 2]], True, ([1, 2], [1, 2])),
        ([[2.5, -0.1], [-3.0, 0.2]], [[1.0, 0.0], [1.0, 1.0]], False, ([1, 0, 0, 1], [1, 0, 1, 1])),
        ([[2.5, -0.1], [-3.0, 0.2]], [[1, -100], [0, 1]], False, ([1, 0, 1], [1, 0, 1])),
        ([[0.5], [2.0]], [0.4, np.nan], False, ([0.5], [0.4])),  # a regression
    ],
)
def test_what_is_compared_by_name(outputs, labels, shifted, expected):
    given = EvalPrediction(np.asarray(outputs), np.asarray(labels))
    for found, wanted in zip(decided(given, shifted), expected, strict=True):
        assert found.tolist() == wanted


def test_what_is_generated_is_not_compared_by_name(tmp_path, script):
    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, use_cpu=True)
    with pytest.raises(ValueError, match="has to be decoded"):
        run_tasks(vit(), two_tasks(), args, compute_metrics=script("hits", "1"))
