"""What evaluation gives: which figures are kept, and scores that are no numbers."""

import json
import logging
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import bert, gpt2, llama
from peft import LoraConfig, get_peft_model
from test_tasks import arguments, two_tasks, vit
from transformers import EvalPrediction, TrainerCallback

from hf_ewc import Task, run_tasks
from hf_ewc.report import read_results
from hf_ewc.tasks.evaluation import figures_of
from hf_ewc.tasks.token_scores import TokenScores, is_causal


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


def test_metrics_that_return_nothing_say_so(tmp_path):
    with pytest.raises(
        TypeError, match=r"compute_metrics of task .* returned None, a NoneType; needed is a dict"
    ):
        run_tasks(
            vit(), two_tasks(), arguments(tmp_path, max_steps=1), compute_metrics=lambda p: None
        )


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({1: 0.5}, "names a figure 1, a int; needed is a string"),
        ({"accuracy": "high"}, "gives 'high' as its accuracy, a str, by which the task is scored"),
        ({"eval_accuracy": [0.5]}, r"gives \[0.5\] as its eval_accuracy, a list"),
    ],
)
def test_figures_that_are_no_score_say_so(figures, message, tmp_path):
    with pytest.raises(TypeError, match=f"compute_metrics of task '0 or 1' {message}"):
        run_tasks(
            vit(), two_tasks(), arguments(tmp_path, max_steps=1), compute_metrics=lambda p: figures
        )


def test_a_score_that_is_none_later_loses_no_run(tmp_path, caplog):
    """As one that is no number: null, said once, and the same call goes on."""
    calls = []

    def metrics(prediction):
        calls.append(1)
        return {"accuracy": 0.5 if len(calls) < 4 else None, "f1": 0.1}

    def run():
        args = arguments(tmp_path, max_steps=1)
        return run_tasks(vit(), two_tasks(), args, compute_metrics=metrics)

    first = run()
    assert np.isnan(first.matrix.scores).any()
    assert "no finite number for accuracy on" in caplog.text
    assert json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run().metrics == first.metrics


def test_metrics_of_losses_and_inputs_beside(tmp_path):
    """What they are handed over is of the whole evaluation, which no rehearsal has."""
    args = arguments(tmp_path, max_steps=1, include_for_metrics=["inputs", "loss"])
    found = run_tasks(vit(), two_tasks(), args)
    assert 0 <= found.matrix[1, 0] <= 1


def test_a_model_of_which_nothing_trains(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        run_tasks(vit().requires_grad_(False), two_tasks(), arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_frozen_between_tasks(tmp_path):
    def freeze(trainer, task, results):
        trainer.model.requires_grad_(False)

    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        run_tasks(vit(), two_tasks(), args, after_task=freeze)
    assert run_tasks(vit(), two_tasks(), args).matrix.num_learnt == 2  # the first one is kept


def test_heads_of_their_own_over_a_model_that_is_frozen(tmp_path):
    model = vit().requires_grad_(False)
    before = {name: p.clone() for name, p in model.vit.named_parameters()}
    tasks = [replace(task, classes=None, head=4) for task in two_tasks()]
    found = run_tasks(model, tasks, arguments(tmp_path, max_steps=2))
    assert found.matrix.num_learnt == 2
    after = dict(found.model.vit.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


class Counting:
    """Adds up over the batches of an evaluation, and returns figures with the last alone."""

    def __init__(self):
        self.right = self.all = 0

    def __call__(self, prediction, compute_result):
        self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        self.all += len(prediction.label_ids)
        if not compute_result:
            return None
        found = {"accuracy": self.right / self.all}
        self.right = self.all = 0
        return found


def test_metrics_of_single_batches(tmp_path):
    def run(folder, compute_metrics, **changes):
        args = arguments(tmp_path / folder, max_steps=2, per_device_eval_batch_size=5, **changes)
        done = run_tasks(vit(), two_tasks(), args, compute_metrics=compute_metrics)
        return done.matrix.scores

    batched = run("batched", Counting(), batch_eval_metrics=True)
    np.testing.assert_allclose(batched, run("whole", None), equal_nan=True)


def test_perplexity_is_shown_as_what_it_is(tmp_path):
    data = [{"input_ids": [1, 2, i % 5, 4], "labels": [1, 2, i % 5, 4]} for i in range(8)]
    tasks = [Task(name, data, data, metric="perplexity") for name in ("a", "b")]
    model = gpt2()
    result = run_tasks(model, tasks, arguments(tmp_path, max_steps=1))
    figures = result.metrics[1]["a"]
    assert figures["perplexity"] == pytest.approx(perplexity(model, data), rel=1e-4)
    assert result.matrix[1, 0] == -figures["perplexity"]
    stored = read_results(tmp_path / "results.json")[1]["runs"]["plain"][0]
    assert stored["scores"][1][0] == pytest.approx(figures["perplexity"])
    report = (tmp_path / "report.md").read_text()
    assert "average perplexity ↓" in report
    assert "-" + f"{figures['perplexity']:.3f}" not in report


@pytest.mark.parametrize(
    ("metric", "said", "is_less"),
    [
        ("mse", None, True),
        ("squared_error", None, True),
        ("WER", None, True),
        ("f1", None, False),
        ("mse", True, False),
        ("distance", False, True),
    ],
)
def test_of_errors_less_is_better(metric, said, is_less, tmp_path):
    tasks = [
        replace(task, metric=metric, greater_is_better=said)
        for task in with_figures(two_tasks(), **{metric: 0.25})
    ]
    result = run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1))
    assert result.matrix[0, 0] == (-0.25 if is_less else 0.25)
    assert result.matrix.lower_is_better == (
        {task.name: metric for task in tasks} if is_less else {}
    )


def test_general_text_is_only_evaluated(tmp_path):
    data = [{"input_ids": [1, 2, i % 5, 4], "labels": [1, 2, i % 5, 4]} for i in range(8)]
    general = [{"input_ids": [7, 7, i % 3, 9], "labels": [7, 7, i % 3, 9]} for i in range(8)]
    tasks = [Task(name, data, data, metric="perplexity") for name in ("a", "b")]
    also = [Task("general text", None, general, metric="perplexity")]
    options = dict(args=arguments(tmp_path, max_steps=1), evaluate_also=also)
    model = gpt2()
    before = perplexity(model, general)
    result = run_tasks(model, tasks, **options)
    found = -result.matrix.others["general text"]
    assert found[0] == pytest.approx(before, rel=1e-4)
    assert found[2] == pytest.approx(perplexity(model, general), rel=1e-4)
    assert found[2] == result.metrics[1]["general text"]["perplexity"]
    alone = run_tasks(gpt2(), tasks, arguments(tmp_path / "alone", max_steps=1))
    assert result.matrix.summary() == alone.matrix.summary()
    report = (tmp_path / "report.md").read_text()
    assert "| before" in report
    assert "general text ↓" in report
    again = run_tasks(gpt2(), tasks, **options)
    assert again.matrix == result.matrix


def perplexity(model, data):
    batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        return math.exp(model.eval()(**batch).loss)


@pytest.mark.parametrize("metric", ["perplexity", "accuracy", "loss"])
def test_perplexity_counts_labelled_tokens_over_all_batches(tmp_path, metric):
    # Rows with few and with many labels, in batches of two: no mean over batches is right.
    rows = [
        [1, 2, 3, 4, 5, 6],
        [-100, -100, 3, 4, -100, -100],
        [-100] * 5 + [6],
        [1, 2, -100, 4, 5, 6],
    ]
    data = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": labels} for labels in rows]
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=2)
    model = gpt2()
    figures = run_tasks(model, [Task("a", data, data, metric=metric)], args).metrics[0]["a"]
    total = hits = tokens = 0
    with torch.no_grad():
        for row in data:
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0].double()
            for position, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total -= float(logits[position].log_softmax(-1)[label])
                    hits += int(logits[position].argmax() == label)
                    tokens += 1
    assert figures["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    if metric == "accuracy":
        assert figures["accuracy"] == pytest.approx(hits / tokens)


def test_perplexity_from_logits_is_that_from_sums():
    chance = np.random.default_rng(0)
    logits, labels = chance.normal(size=(3, 4, 5)), chance.integers(0, 5, (3, 4))
    scores = TokenScores(shifted=True, with_accuracy=True)
    sums = scores.sums(torch.tensor(logits), torch.tensor(labels)).numpy()
    expected = scores(EvalPrediction(logits, labels))
    assert scores(EvalPrediction(sums, labels)) == pytest.approx(expected)
    assert scores(EvalPrediction((logits, None), labels)) == expected
    wild = TokenScores(shifted=False, with_accuracy=False)
    assert wild(EvalPrediction(np.array([[1e6, 0, 1.0]]), labels)) == {"perplexity": math.inf}
    with pytest.raises(ValueError, match="no labels"):
        scores(EvalPrediction(np.zeros((1, 3)), labels))
    with pytest.raises(ValueError, match=r"labels have the shape \(3,\)"):
        scores.sums(torch.zeros(3, 2), torch.zeros(3))


def test_what_is_only_evaluated_shares_the_head(tmp_path):
    first, second = two_tasks()
    also = [Task("0 to 3", None, first.eval_dataset + second.eval_dataset)]
    result = run_tasks(vit(), [first, second], arguments(tmp_path, max_steps=1), evaluate_also=also)
    assert not np.isnan(result.matrix.others["0 to 3"]).any()


@pytest.mark.parametrize(
    ("also", "error", "message"),
    [
        (["general"], TypeError, "must be a list of hf_ewc.Task"),
        ([Task("x", [{"a": 1}], [{"a": 1}])], ValueError, "has a train_dataset"),
        ([Task("x", None, None)], ValueError, "has no eval_dataset"),
        ([Task("x", None, [])], ValueError, "is empty"),
        ([Task("0 or 1", None, [{"a": 1}])], ValueError, "name of its own"),
    ],
)
def test_what_cannot_be_evaluated_beside(tmp_path, also, error, message):
    with pytest.raises(error, match=message):
        run_tasks(vit(), two_tasks(), arguments(tmp_path), evaluate_also=also)


def test_a_report_that_a_kill_took_is_made_by_the_next_call(tmp_path):
    def run():
        return run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=1))

    run()
    whole = (tmp_path / "report.md").read_bytes()
    results = (tmp_path / "results.json").stat().st_mtime_ns
    for name in ("report.md", "curves.png"):
        (tmp_path / name).unlink()
    run()
    assert (tmp_path / "report.md").read_bytes() == whole
    assert (tmp_path / "curves.png").exists()
    (tmp_path / "report.md").write_text("of the first task")
    os.utime(tmp_path / "report.md", (1, 1))
    run()
    assert (tmp_path / "report.md").read_bytes() == whole
    assert (tmp_path / "results.json").stat().st_mtime_ns == results


def test_which_models_predict_the_next_token():
    assert is_causal(gpt2())
    assert is_causal(llama())
    assert is_causal(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    assert not is_causal(vit())
    assert not is_causal(bert())
