"""What cannot be scored is said before the first step, and looking at it changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import Examples, bert
from test_tasks import arguments
from transformers import TrainerCallback

from hf_ewc import EWCConfig, EWCTrainer, SequenceConfig, Task, run_tasks
from hf_ewc.tasks import rehearsal


class Steps(TrainerCallback):
    """Counts steps, and what is told of evaluation."""

    def __init__(self):
        self.steps = self.evaluations = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1

    def on_prediction_step(self, *args, **kwargs):
        self.evaluations += self.steps == 0

    on_evaluate = on_prediction_step


def test_batches_of_one_are_looked_at_one_at_a_time(tmp_path):
    """As where nothing is padded, and texts are not as long as each other."""
    rows = Examples("bert", 8)
    cut = [{k: v[: 3 + n % 3] if v.dim() else v for k, v in r.items()} for n, r in enumerate(rows)]
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    args = arguments(tmp_path, max_steps=2, **sizes)
    assert len(run_tasks(bert(), [Task("a", cut, cut)], args).metrics) == 1
    args = arguments(tmp_path / "two", max_steps=2, **{**sizes, "per_device_eval_batch_size": 2})
    with pytest.raises(ValueError, match="first examples of the eval_dataset of task 'a'"):
        run_tasks(bert(), [Task("a", cut, cut)], args)


def examples(**changed):
    rows = Examples("bert", 8)
    return [
        {**{k: v for k, v in row.items() if k not in changed}, **_given(changed)} for row in rows
    ]


def _given(changed):
    return {name: value for name, value in changed.items() if value is not None}


def tasks(*changed, **settings):
    """A first task as it should be, and a second one that is scored on these examples."""
    first = Task("a", examples(), examples())
    return [first, replace(first, name="b", eval_dataset=list(changed), **settings)]


def typo(prediction):
    return {"acuracy": 0.5}


CASES = {
    "no labels": (tasks(*examples(labels=None)), ValueError, "task 'b' is scored by 'accuracy'"),
    "a text": (
        tasks(*examples(input_ids=None, attention_mask=None, text="a")),
        ValueError,
        "eval_dataset of task 'b' cannot be scored",
    ),
    "a label beyond the head": (
        tasks(*examples(labels=torch.tensor(7))),
        ValueError,
        "eval_dataset of task 'b' cannot be scored: IndexError",
    ),
    "a number in place of figures": (
        tasks(*examples(), compute_metrics=lambda prediction: 0.5),
        TypeError,
        "compute_metrics of task 'b' returned 0.5, a float",
    ),
    "a figure that is no number": (
        tasks(*examples(), compute_metrics=lambda prediction: {"accuracy": np.array([0.5])}),
        TypeError,
        "compute_metrics of task 'b' gives array([0.5]) as its accuracy, a ndarray, by which",
    ),
    "another figure": (
        tasks(*examples(), compute_metrics=typo),
        ValueError,
        "task 'b' is scored by 'accuracy'; evaluation returned ['acuracy', 'loss']",
    ),
    "no accuracy to be had": (
        tasks(*examples(labels=torch.tensor([0.5, 1.0]))),
        ValueError,
        "eval_dataset of task 'b' cannot be scored",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_scored_is_said_before_the_first_step(case, tmp_path):
    sequence, kind, message = CASES[case]
    counted = Steps()
    with pytest.raises(kind, match=re.escape(message)):
        run_tasks(bert(), sequence, arguments(tmp_path, max_steps=2), callbacks=[counted])
    assert counted.steps == 0


def test_of_general_texts_too(tmp_path):
    counted, also = Steps(), Task("c", None, examples(labels=None))
    with pytest.raises(ValueError, match="task 'c' is scored by 'accuracy'"):
        run_tasks(
            bert(),
            tasks(*examples()),
            arguments(tmp_path, max_steps=2),
            evaluate_also=[also],
            callbacks=[counted],
        )
    assert counted.steps == 0


def test_metrics_that_few_examples_are_too_few_for(tmp_path):
    def of_many(prediction):
        if len(prediction.label_ids) < 8:
            raise ValueError("correlation of two values")
        return {"accuracy": 0.5}

    found = run_tasks(
        bert(), tasks(*examples(), compute_metrics=of_many), arguments(tmp_path, max_steps=1)
    )
    assert found.matrix[1, "b"] == 0.5


def test_first_examples_without_a_label(tmp_path):
    unlabelled, labelled = examples(labels=torch.tensor(-100)), examples()
    sequence = tasks(*unlabelled[:2], *labelled[2:])
    found = run_tasks(bert(), sequence, arguments(tmp_path, max_steps=1))
    assert 0 <= found.matrix[1, "b"] <= 1


class OwnEvaluation(EWCTrainer):
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        return {f"{metric_key_prefix}_accuracy": len(eval_dataset) / 16}


def test_a_trainer_that_evaluates_in_a_way_of_its_own_is_left_to_it(tmp_path):
    sequence = tasks(*examples(input_ids=None, text="a"))
    args = arguments(tmp_path, max_steps=1)
    found = run_tasks(bert(), sequence, args, trainer_class=OwnEvaluation)
    assert found.matrix[1, "b"] == 0.5


class Remembering(EWCTrainer):
    """A loss with a counter and random numbers, as of queues and noise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = 0

    def compute_loss(self, *args, **kwargs):
        self.losses += 1
        loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
        loss = loss * (1 + 0.1 * torch.rand(())) + 0.01 * self.losses * outputs.logits.mean()
        return (loss, outputs) if kwargs.get("return_outputs") else loss


def test_looking_changes_nothing(tmp_path, monkeypatch):
    def weights(folder):
        counted, model = Steps(), bert(hidden_dropout_prob=0.1)
        run_tasks(
            model,
            tasks(*examples()),
            arguments(tmp_path / folder, max_steps=3),
            EWCConfig(ewc_lambda=1.0),
            trainer_class=Remembering,
            callbacks=[counted],
        )
        assert counted.evaluations == 0
        return dict(model.state_dict())

    looked = []
    prepared = rehearsal._first_batch
    monkeypatch.setattr(
        rehearsal, "_first_batch", lambda *args: looked.append(args) or prepared(*args)
    )
    found = weights("with")
    assert len(looked) == 2
    monkeypatch.setattr(rehearsal, "rehearse", lambda *args: None)
    expected = weights("without")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_task_is_looked_at_once_also_by_a_head_that_grows(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(
        rehearsal, "rehearse", lambda trainer, tasks, *args: looked.extend(t.name for t in tasks)
    )
    sequence, args = tasks(*examples()), arguments(tmp_path / "a", max_steps=1)
    also = Task("c", None, examples())
    run_tasks(bert(), sequence, args, evaluate_also=[also])
    assert looked == ["a", "b", "c"]
    looked.clear()
    growing = SequenceConfig(grow_head=True)
    args = arguments(tmp_path / "b", max_steps=1)
    run_tasks(bert(), sequence, args, sequence_config=growing, evaluate_also=[also])
    assert looked == ["a", "c", "b"]


def test_examples_without_labels(tmp_path):
    unlabelled = Task("a", examples(), examples(labels=None))
    with pytest.raises(ValueError, match="evaluation returned nothing: its examples have no label"):
        run_tasks(bert(), [unlabelled], arguments(tmp_path, max_steps=1))
