"""What evaluation gives: which figures are kept, and scores that are no numbers."""

import logging
import math

import numpy as np
import pytest
import torch
from models import gpt2
from test_tasks import arguments, two_tasks, vit
from transformers import TrainerCallback

from hf_ewc import Task, run_tasks
from hf_ewc.report import read_results
from hf_ewc.tasks.evaluation import figures_of


def test_timings_are_no_results():
    metrics = {
        "eval_a_accuracy": 0.5,
        "eval_a_runtime": 1.0,
        "eval_a_samples_per_second": 2.0,
        "eval_a_steps_per_second": 2.0,
        "eval_a_model_preparation_time": 0.1,
        "eval_a_jit_compilation_time": 0.1,
        "eval_a_mem_cpu_alloc_delta": 4096,
        "eval_a_reaction_time": 0.3,  # the user's own
        "eval_ab_accuracy": 0.7,  # another task's
        "epoch": 1.0,
    }
    assert figures_of(metrics, "eval_a") == {"accuracy": 0.5, "reaction_time": 0.3}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (math.inf, None),
        (-math.inf, None),
        (math.nan, None),
        (np.float64("inf"), None),
        (torch.tensor(math.nan), None),
        (10**400, None),
        (-(10**400), None),
    ],
)
def test_a_figure_is_a_float_or_none(value, kept):
    (found,) = figures_of({"eval_a_x": value}, "eval_a").values()
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize("value", ["text", [1.0], np.ones(2), {"a": 1}, None])
def test_what_is_no_single_number_is_left_out(value):
    assert figures_of({"eval_a_x": value}, "eval_a") == {}


def with_figures(tasks, **figures):
    def metrics(_):
        return {"accuracy": 0.5, **figures}

    return [
        Task(t.name, t.train_dataset, t.eval_dataset, t.classes, compute_metrics=metrics)
        for t in tasks
    ]


@pytest.mark.parametrize("figure", [math.inf, math.nan, 10**400])
def test_a_figure_that_is_no_number_ends_no_run(tmp_path, caplog, figure):
    tasks = with_figures(two_tasks(), perplexity=figure)
    with caplog.at_level(logging.WARNING, logger="hf_ewc"):
        result = run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1))
    assert result.metrics[1]["0 or 1"]["perplexity"] is None
    assert result.metrics[1]["2 or 3"]["accuracy"] == 0.5
    said = [message for message in caplog.messages if "perplexity on '0 or 1'" in message]
    assert len(said) == 1
    again = run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1))
    assert again.metrics == result.metrics
    assert again.matrix == result.matrix


def test_a_score_that_is_no_number_is_not_measured(tmp_path):
    tasks = with_figures(two_tasks(), accuracy=math.nan)
    result = run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1), evaluate_unseen=True)
    assert np.isnan(result.matrix.scores).all()
    assert np.isnan(result.matrix.baseline).all()
    assert result.matrix.summary() == {}
    again = run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1), evaluate_unseen=True)
    assert again.matrix == result.matrix


COUNT = """
import datasets
import evaluate


class Count(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        return {"count": len(references)}
"""


@pytest.mark.parametrize("of_the_task", [True, False])
def test_metrics_by_name(tmp_path, of_the_task):
    (tmp_path / "count.py").write_text(COUNT)
    names = [str(tmp_path / "count.py")]
    tasks, given = two_tasks(), {"compute_metrics": names}
    if of_the_task:
        tasks = [Task(t.name, t.train_dataset, t.eval_dataset, t.classes, **given) for t in tasks]
        given = {}
    result = run_tasks(vit(), tasks, arguments(tmp_path / "run", max_steps=1), **given)
    figures = result.metrics[1]["0 or 1"]
    assert set(figures) == {"accuracy", "count", "loss"}
    assert figures["count"] == 16
    assert result.matrix[1, 0] == figures["accuracy"]
    again = run_tasks(vit(), tasks, arguments(tmp_path / "run", max_steps=1), **given)
    assert again.metrics == result.metrics


def test_a_name_that_is_not_known_ends_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)

    class NoStep(TrainerCallback):
        def on_train_begin(self, *_, **__):
            raise AssertionError("training began")

    with pytest.raises(ValueError, match="names 'acuracy'"):
        run_tasks(
            vit(), two_tasks(), arguments(tmp_path), compute_metrics="acuracy", callbacks=[NoStep()]
        )


def test_perplexity_is_shown_as_what_it_is(tmp_path):
    data = [{"input_ids": [1, 2, i % 5, 4], "labels": [1, 2, i % 5, 4]} for i in range(8)]
    tasks = [Task(name, data, data, metric="perplexity") for name in ("a", "b")]
    result = run_tasks(gpt2(), tasks, arguments(tmp_path, max_steps=1))
    figures = result.metrics[1]["a"]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert result.matrix[1, 0] == -figures["perplexity"]
    stored = read_results(tmp_path / "results.json")[1]["runs"]["plain"][0]
    assert stored["scores"][1][0] == pytest.approx(figures["perplexity"])
    report = (tmp_path / "report.md").read_text()
    assert "average perplexity ↓" in report
    assert "-" + f"{figures['perplexity']:.3f}" not in report
