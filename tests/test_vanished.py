"""Tasks whose Fisher has vanished beside the others' are named, once, with the cure."""

import json
import logging
from dataclasses import asdict

import pytest
import torch
from stored import RECORD
from test_tasks import arguments as task_arguments
from test_tasks import two_tasks, vit

from hf_ewc import EWCConfig, EWCTrainer, run_tasks
from hf_ewc.state.records import TaskRecord
from hf_ewc.state.vanished import vanished, warning_of
from tests.models import Examples, bert
from tests.training import arguments


def records(*traces):
    plain = {
        key: value for key, value in asdict(RECORD).items() if key not in ("name", "fisher_trace")
    }
    return [TaskRecord(name=f"t{i}", fisher_trace=trace, **plain) for i, trace in enumerate(traces)]


@pytest.mark.parametrize(
    ("traces", "expected"),
    [
        ([1.0, 2.0, 0.001], ["t2"]),
        ([1.0, 2.0, 0.002], []),
        ([0.0, 5.0], ["t0"]),
        ([0.0, 0.0], []),
        ([1.0], []),
        ([None, 1.0], []),
        ([1e-9, 1.0, None, 1.0, 1e-9], ["t0", "t4"]),
    ],
)
def test_which_have_vanished(traces, expected):
    assert [task.name for task in vanished(records(*traces))] == expected


def test_each_is_said_once_also_of_an_earlier_task():
    tasks = records(1e-9, 1.0, 2.0)
    assert warning_of(tasks[:1], tasks[:1]) is None
    assert "'t0'" in str(warning_of(tasks[:1], tasks[:2]))
    assert warning_of(tasks[:2], tasks) is None


def test_a_trainer_warns_and_names_the_cure(tmp_path, caplog):
    """After a second task of which everything is sure: its head's outputs are a million apart."""
    model = bert()
    trainer = EWCTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Examples("bert", 4),
        ewc_config=EWCConfig(fisher_type="exact"),
    )
    trainer.consolidate(name="open")
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1e6, 0.0, 0.0]))
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        trainer.consolidate(name="by heart")
    assert "'by heart' (0)" in caplog.text
    assert "fisher_data='held_out'" in caplog.text
    assert trainer.ewc_state.tasks[0].fisher_trace > 0


def test_the_report_shows_each_tasks_fisher(tmp_path):
    args = task_arguments(tmp_path, max_steps=1)
    result = run_tasks(vit(), two_tasks(), args, EWCConfig(fisher_samples=4))
    content = json.loads((tmp_path / "results.json").read_text())
    traces = [task.fisher_trace for task in result.state.tasks]
    assert [found["trace"] for found in content["fishers"]] == traces
    assert f"{traces[1]:.3g} |" in (tmp_path / "report.md").read_text()
