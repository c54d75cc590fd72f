"""What a run tells of λ at a task's end, held to figures by hand."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from test_tasks import arguments, two_tasks, vit
from transformers import ViTForImageClassification

from hf_ewc import AccuracyMatrix, EWCConfig, EWCState, run_tasks
from hf_ewc.state.drift import squared_drift
from hf_ewc.tasks.aftermath import Aftermath, aftermath, lost_share
from tests.models import random_quadratic


def of(penalty=0.01, task_loss=1.0, lost=0.2):
    return Aftermath("b", 0.9, lost, penalty, task_loss, {"vit.layers.0": 3.0, "head": 0.5})


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        (of(), "ten times larger"),
        (of(lost=0.01), ""),
        (of(lost=None), ""),
        (of(penalty=0.5), ""),
        (of(penalty=1.5), "too large"),
        (of(penalty=1.5, lost=0.0), "too large"),
        (of(penalty=4e-8), "fisher_data='held_out'"),
        (of(penalty=4e-8, lost=0.0), ""),
        (of(task_loss=None), ""),
        (of(task_loss=0.0), ""),
        (of(penalty=0.02, task_loss=-1.0), "ten times larger"),
    ],
)
def test_what_is_said_of_lambda(found, advice):
    assert advice in found.advice()
    assert bool(found.advice()) == bool(advice)
    line = found.in_words()
    assert "\n" not in line
    assert line.startswith("After 'b': its score is 0.9")
    assert "vit.layers.0 3, head 0.5" in line


def test_a_perplexity_is_told_as_people_read_it():
    matrix = AccuracyMatrix(["a", "b"], lower_is_better={"b": "perplexity"})
    matrix[0, "a"], matrix[1, "a"], matrix[1, "b"] = 0.5, 0.5, -33.2
    found = aftermath(matrix, 1, {"w": 1.0}, {"w": 2.0}, [])
    assert found.in_words().startswith("After 'b': its score is 33.2, ")


def test_what_is_lost_is_a_share_of_the_best():
    matrix = AccuracyMatrix(["a", "b", "c"])
    matrix[0, "a"], matrix[1, "a"], matrix[1, "b"] = 0.5, 0.8, 0.4
    assert lost_share(matrix, 0) is None
    assert lost_share(matrix, 1) == pytest.approx((0.5 - 0.8) / 0.5)
    assert lost_share(matrix, 2) is None  # nothing is known after it yet
    matrix[2, "a"], matrix[2, "b"] = 0.6, 0.4
    assert lost_share(matrix, 2) == pytest.approx(0.5 * (0.2 / 0.8))
    matrix.scores[:2, 0] *= -1  # of a loss the other sign is a score
    matrix[2, "a"] = -1.0
    assert lost_share(matrix, 2) == pytest.approx(0.5 * (-0.5 + 1.0) / 0.5)


def test_the_drift_is_in_units_of_the_fisher():
    model = vit()
    state = EWCState(*random_quadratic(model))
    for name, square in squared_drift(state, model).items():
        theta = dict(model.named_parameters())[name].detach().double()
        step = theta - state.anchor[name].double()
        assert square == pytest.approx((state.importance[name].double() * step**2).sum().item())


def test_a_run_tells_it_after_each_task_that_was_held(tmp_path, caplog):
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1)
    config = EWCConfig(ewc_lambda=50.0, fisher_samples=8)
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        result = run_tasks(vit(), two_tasks(masked=False), args, config)
    content = json.loads((tmp_path / "results.json").read_text())
    (found,) = content["aftermaths"]
    folders = [
        tmp_path / f"0{k + 1}-{name}" / "final" for k, name in enumerate(["0-or-1", "2-or-3"])
    ]
    state = EWCState.from_pretrained(folders[0])
    weights = ViTForImageClassification.from_pretrained(folders[1]).state_dict()
    squares = {
        name: float(
            (f.double() * (weights[name].double() - state.anchor[name].double()) ** 2).sum()
        )
        for name, f in state.importance.items()
    }
    assert found["penalty"] == pytest.approx(25.0 * sum(squares.values()), rel=1e-4)
    head = [value for name, value in squares.items() if name.startswith("classifier")]
    assert found["drift"]["classifier"] == pytest.approx(math.sqrt(sum(head)), rel=1e-4)
    assert found["task_loss"] == content["history"][1][-1]["task_loss"]
    best, now = result.matrix[0, 0], result.matrix[1, 0]
    assert found["lost"] == pytest.approx((best - now) / best)
    assert found["score"] == result.matrix[1, 1]
    (line,) = [record.message for record in caplog.records if "After '2 or 3'" in record.message]
    assert "units of 1/√F" in line
    assert "After '2 or 3'" in (tmp_path / "report.md").read_text()
    # Gone on with, it has what was told before.
    again = run_tasks(vit(), two_tasks(masked=False), args, config)
    assert np.array_equal(again.matrix.scores, result.matrix.scores, equal_nan=True)


def test_plain_training_has_nothing_to_tell(tmp_path):
    run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=1))
    assert "aftermaths" not in json.loads((tmp_path / "results.json").read_text())


def test_the_tensors_of_the_model_keep_no_graph(tmp_path):
    model = vit()
    squared_drift(EWCState(*random_quadratic(model)), model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
