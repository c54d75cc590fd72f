"""The Fisher on examples that are kept out of training, and what a state says of each task."""

import json

import pytest
import torch
from datasets import Dataset
from test_tasks import arguments, examples, two_tasks, vit

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher, SequenceConfig, Task, run_tasks
from hf_ewc.cli.main import main
from hf_ewc.state.records import TaskRecord
from hf_ewc.training.held_out import held_out_rows, other_rows
from tests.fisher_oracle import assert_close, empirical

HELD_OUT = EWCConfig(ewc_lambda=100.0, fisher_type="empirical", fisher_data="held_out")


def batch_of(data):
    return {
        "pixel_values": torch.stack([torch.as_tensor(e["pixel_values"]) for e in data]),
        "labels": torch.tensor([e["labels"] for e in data]),
    }


def kind(data, name):
    if name == "list":
        return data
    rows = [{**e, "pixel_values": e["pixel_values"].tolist()} for e in data]
    return Dataset.from_list(rows).with_format("torch")


@pytest.mark.parametrize("name", ["list", "Dataset"])
def test_a_trainer_learns_from_the_others_and_estimates_on_these(tmp_path, name):
    data = examples((0, 1), 20)
    options = dict(train_dataset=kind(data, name), ewc_config=HELD_OUT)
    trainer = EWCTrainer(vit(), arguments(tmp_path, max_steps=2), **options)
    rows = held_out_rows(20, 42)
    assert len(rows) == 4
    assert [int(e["labels"]) for e in trainer.train_dataset] == [
        data[i]["labels"] for i in other_rows(20, rows)
    ]
    trainer.train()
    state = trainer.consolidate()
    expected = empirical(trainer.model, batch_of([data[i] for i in rows]))
    assert_close(dict(state.importance.items()), expected)
    again = EWCTrainer(vit(), arguments(tmp_path, max_steps=2), **options)
    assert len(again._ewc_hold_out()) == 4  # the same ones
    assert [int(e["labels"]) for e in again._ewc_hold_out()] == [data[i]["labels"] for i in rows]


@pytest.mark.parametrize("name", ["list", "Dataset"])
def test_other_data_on_the_same_trainer_is_held_out_of_too(tmp_path, name):
    """The Fisher is not of the first task's examples, nor of what was trained on."""
    trainer = EWCTrainer(
        vit(),
        arguments(tmp_path, max_steps=2),
        train_dataset=kind(examples((0, 1), 20), name),
        ewc_config=HELD_OUT,
    )
    data, rows = examples((2, 3), 30), held_out_rows(30, 42)
    trainer.train_dataset = kind(data, name)
    trainer.train()
    assert [int(e["labels"]) for e in trainer.train_dataset] == [
        data[i]["labels"] for i in other_rows(30, rows)
    ]
    kept = trainer.train_dataset
    state = trainer.consolidate()
    assert trainer.train_dataset is kept
    assert_close(
        dict(state.importance.items()),
        empirical(trainer.model, batch_of([data[i] for i in rows])),
    )


def mark(example):
    """A number that tells examples apart, also those of other classes with the same noise."""
    return float((example["pixel_values"].flatten() * torch.arange(16)).sum())


@pytest.mark.parametrize("sequence", [{}, {"replay_share": 0.5}])
def test_a_run_holds_out_of_each_tasks_own_examples(tmp_path, monkeypatch, sequence):
    given, fishers = [], []
    train, consolidate = EWCTrainer.train, EWCTrainer.consolidate

    def watched(self, *args, **kwargs):
        given.append([mark(self.train_dataset[i]) for i in range(len(self.train_dataset))])
        return train(self, *args, **kwargs)

    def looked_at(self, dataset=None, **kwargs):
        fishers.append([mark(example) for example in dataset])
        return consolidate(self, dataset, **kwargs)

    monkeypatch.setattr(EWCTrainer, "train", watched)
    monkeypatch.setattr(EWCTrainer, "consolidate", looked_at)
    tasks = two_tasks(masked=False)
    options = dict(sequence_config=SequenceConfig(**sequence), scenario="domain")
    run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1), HELD_OUT, **options)
    for k, task in enumerate(tasks):
        own = [mark(example) for example in task.train_dataset]
        rows = held_out_rows(24, 42 + k)
        assert fishers[k] == [own[i] for i in rows]
        assert set(own) & set(given[k]) == {own[i] for i in other_rows(24, rows)}
    assert len(given[1]) == 19 + (12 if sequence else 0)


def test_a_data_set_of_the_users_comes_first(tmp_path):
    task = Task("a", examples((0, 1)), examples((0, 1)), fisher_dataset=examples((0, 1), 6))
    result = run_tasks(vit(), [task], arguments(tmp_path, max_steps=1), HELD_OUT)
    assert result.state.tasks[0].num_examples == 6


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples((0, 1)))


def test_streams_are_refused(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="stream"):
        EWCTrainer(vit(), args, train_dataset=Stream(), ewc_config=HELD_OUT)
    with pytest.raises(ValueError, match="'held_out' holds a part"):
        run_tasks(vit(), [Task("a", Stream(), examples((0, 1)))], args, HELD_OUT)
    with pytest.raises(ValueError, match="1 examples"):
        EWCTrainer(vit(), args, train_dataset=examples((0, 1), 1), ewc_config=HELD_OUT)


@pytest.mark.parametrize("config", [HELD_OUT, None])
def test_fewer_examples_than_a_batch_that_are_dropped_teach_nothing(config, tmp_path):
    """Of eight examples one is held out; what is left makes no whole batch of eight."""
    tasks = [Task("few", examples((0, 1), 8 if config else 7), examples((0, 1)))]
    args = arguments(tmp_path, max_steps=3, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"Task 'few' was trained for no step.* of [67] examples"):
        run_tasks(vit(), tasks, args, config)


# ---- What a state says of each task ----


def test_trace_and_lambda_stand_in_the_state_and_are_shown(tmp_path, capsys):
    config = EWCConfig(ewc_lambda=10.0, ewc_lambda_growth=3.0, fisher_samples=8)
    tasks = [*two_tasks(), Task("more", examples((0, 1)), examples((0, 1)), classes=(0, 1))]
    result = run_tasks(vit(), tasks, arguments(tmp_path, max_steps=2), config)
    saved = EWCState.from_pretrained(tmp_path / "03-more" / "final")
    assert [record.ewc_lambda for record in saved.tasks] == [None, 10.0, 30.0]
    total = sum(float(value.double().sum()) for _, value in result.state.importance.items())
    assert sum(record.fisher_trace for record in saved.tasks) == pytest.approx(total)
    assert main(["inspect", str(tmp_path / "03-more" / "final")]) == 0
    printed = capsys.readouterr().out
    assert f"{saved.tasks[1].fisher_trace:.4g}" in printed
    assert "learnt with λ" in printed


def test_the_trace_is_per_label():
    fisher = Fisher({"a": torch.full((3,), 2.0)}, labels_per_example=4.0)
    assert fisher.trace == 6.0
    assert TaskRecord.now("a", fisher, 5.0).fisher_trace == 1.5


def test_states_without_them_still_load(tmp_path):
    old = {"name": "a", "num_examples": 1, "fisher_type": "exact", "weight": 1.0, "date": "now"}
    assert TaskRecord(**old).fisher_trace is None
    for field in ("fisher_trace", "ewc_lambda"):
        with pytest.raises(ValueError, match=field):
            TaskRecord(**old, **{field: -1.0})
    assert json.loads(json.dumps(old)) == old
