"""Replayed examples: which are drawn, where they come, what they see of the head."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_tasks import CONFIG, arguments, two_tasks, vit
from torch import nn
from transformers import (
    TrainerCallback,
)

from hf_ewc import SequenceConfig, Task, run_tasks
from hf_ewc.tasks.class_mask import ClassMask
from hf_ewc.tasks.mixture import Mixture, joint_places, mixed, places_with_replay
from hf_ewc.tasks.replay import interleaved, replayed_in

# ---- Replay ----


def labelled(classes, count):
    return [{"labels": classes[i % len(classes)]} for i in range(count)]


def test_a_share_is_drawn_evenly_from_earlier_tasks():
    data = [labelled((0, 1), 4), labelled((0, 1), 50), labelled((0, 1), 50), labelled((0, 1), 100)]
    config = SequenceConfig(replay_share=0.2)
    found = replayed_in(3, data, config)
    assert {task: len(indices) for task, indices in found.items()} == {0: 4, 1: 8, 2: 8}
    for task, indices in found.items():
        assert len(set(indices)) == len(indices)
        assert all(0 <= i < len(data[task]) for i in indices)
    assert found == replayed_in(3, data, config)
    assert found != replayed_in(3, data, replace(config, replay_seed=1))
    assert replayed_in(0, data, config) == {}
    assert sum(map(len, replayed_in(3, data, SequenceConfig(replay_share=1.0)).values())) == 100
    counts = [len(i) for i in replayed_in(3, data, SequenceConfig(replay_share=0.05)).values()]
    assert sorted(counts) == [1, 2, 2]


def test_so_many_of_each_class_and_always_the_same():
    table = Dataset.from_list(labelled((3, 5), 20))
    scores = [{"labels": 0.5 + i} for i in range(20)]
    data = [labelled((0, 1, 2), 30), table, scores, labelled((0, 1), 9)]
    config = SequenceConfig(replay_per_class=4)
    found = replayed_in(3, data, config)
    assert Counter(data[0][i]["labels"] for i in found[0]) == {0: 4, 1: 4, 2: 4}
    assert Counter(table[i]["labels"] for i in found[1]) == {3: 4, 5: 4}
    assert len(found[2]) == 4
    assert replayed_in(1, data, config)[0] == found[0]
    assert len(replayed_in(3, data, SequenceConfig(replay_per_class=100))[1]) == 20


def test_the_reservoir_is_a_uniform_sample_of_all_that_was_seen():
    data = [labelled((0,), 10), labelled((1,), 30), labelled((2,), 5)]
    counts = np.zeros(40)
    for seed in range(500):
        config = SequenceConfig(replay_size=8, replay_seed=seed)
        found = replayed_in(2, data, config)
        assert sum(map(len, found.values())) == 8
        for task, indices in found.items():
            counts[np.array(indices) + (0, 10)[task]] += 1
    # Each of 40 is in with probability 1/5: 100 times of 500, with a deviation of 9.
    assert np.abs(counts - 100).max() < 4 * 9
    assert replayed_in(1, data, SequenceConfig(replay_size=99)) == {0: list(range(10))}


def test_replayed_examples_are_evenly_between_the_tasks_own():
    assert interleaved(6, 2) == [None, None, 0, None, None, None, 1, None]
    for own, replayed in [(100, 5), (3, 7), (5, 0), (1, 1)]:
        places = interleaved(own, replayed)
        assert places.count(None) == own
        assert [r for r in places if r is not None] == list(range(replayed))
        gaps = np.diff([i for i, r in enumerate(places) if r is not None])
        assert np.ptp(gaps) <= 1 if len(gaps) else True
    places = places_with_replay(2, 20, {0: [3, 4], 1: [5]})
    assert [place for place in places if place[0] == 2] == [(2, i) for i in range(20)]
    assert sorted(place for place in places if place[0] < 2) == [(0, 3), (0, 4), (1, 5)]


def test_a_mixture_of_tables_is_a_table():
    tables = [Dataset.from_list(labelled((k,), 5)) for k in (0, 1)]
    places = [(1, 4), (0, 2), (1, 0)]
    found = mixed(tables, places, tagged=False)
    assert isinstance(found, Dataset)
    assert found["labels"] == [1, 0, 1]
    other = mixed([tables[0], labelled((1,), 5)], places, tagged=False)
    assert isinstance(other, Mixture)
    assert [example["labels"] for example in other] == [1, 0, 1]
    made = [t.with_transform(lambda batch: {"labels": [7] * len(batch["labels"])}) for t in tables]
    assert [example["labels"] for example in mixed(made, places, tagged=False)] == [7, 7, 7]
    assert sorted(joint_places([2, 3], 0)) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


class Seen:
    """The images that a model is trained on, as numbers of the tasks' training examples."""

    def __init__(self, model, tasks):
        self.known = {}
        for k, task in enumerate(tasks):
            for kind, data in (("train", task.train_dataset), ("eval", task.eval_dataset)):
                for i, example in enumerate(data):
                    self.known[example["pixel_values"].numpy().tobytes()] = (kind, k, i)
        self.rows = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if model.training:
            images = kwargs["pixel_values"]
            self.rows += [self.known[image.numpy().tobytes()] for image in images]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "config", [SequenceConfig(replay_share=0.25), SequenceConfig(joint_training=True)]
)
def test_a_task_trains_on_its_own_and_earlier_examples(tmp_path, masked, config):
    model, tasks = vit(), two_tasks(masked)
    seen = Seen(model, tasks)
    args = arguments(tmp_path, num_train_epochs=1)
    run_tasks(model, tasks, args, CONFIG, sequence_config=config, scenario="task")
    later = seen.rows[24:]
    assert {kind for kind, _, _ in seen.rows} == {"train"}
    assert sorted(i for _, k, i in later if k == 1) == list(range(24))
    earlier = sorted(i for _, k, i in later if k == 0)
    if config.joint_training:
        assert earlier == list(range(24))
    else:
        kept = json.loads((tmp_path / "replay.json").read_text())
        assert kept == {"2": {"1": earlier}}
        assert len(earlier) == 6


def test_each_row_of_a_mixed_batch_sees_its_own_tasks_classes():
    torch.manual_seed(0)
    model = vit().eval()
    images = torch.randn(4, 1, 4, 4)
    labels = torch.tensor([0, 3, 1, 2])
    free = model(pixel_values=images).logits
    with ClassMask(model) as mask, mask.only_by_row([(0, 1), (2, 3), (0, 1), None]):
        loss = model(pixel_values=images, labels=labels).loss
    expected = [
        nn.functional.cross_entropy(free[0:1, :2], torch.tensor([0])),
        nn.functional.cross_entropy(free[1:2, 2:], torch.tensor([1])),
        nn.functional.cross_entropy(free[2:3, :2], torch.tensor([1])),
        nn.functional.cross_entropy(free[3:4], torch.tensor([2])),
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    torch.testing.assert_close(model(pixel_values=images).logits, free)


def test_replay_with_classes_trains_as_by_hand(tmp_path):
    """One SGD step on a mixed batch, against the mean loss over each example's own classes."""
    tasks = two_tasks()
    config = SequenceConfig(replay_per_class=2)
    args = arguments(
        tmp_path, max_steps=1, per_device_train_batch_size=28, optim="sgd", max_grad_norm=0.0
    )
    model = vit()
    first = run_tasks(model, tasks[:1], args, sequence_config=config).model
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    after = run_tasks(vit(), tasks, args, sequence_config=config).model
    kept = json.loads((tmp_path / "replay.json").read_text())["2"]["1"]
    batch = [*tasks[1].train_dataset, *(tasks[0].train_dataset[i] for i in kept)]
    logits = first(pixel_values=torch.stack([e["pixel_values"] for e in batch])).logits
    losses = [
        nn.functional.cross_entropy(row[2:] if e["labels"] > 1 else row[:2], torch.tensor(y))
        for row, e, y in zip(logits, batch, [e["labels"] % 2 for e in batch], strict=True)
    ]
    torch.stack(losses).mean().backward()
    for (name, old), new in zip(before.items(), after.parameters(), strict=True):
        expected = old - 1e-2 * dict(first.named_parameters())[name].grad
        torch.testing.assert_close(new.detach(), expected, rtol=1e-4, atol=1e-7)


def test_tasks_with_collators_of_their_own_are_replayed_apart(tmp_path):
    def other(batch):
        assert all("image" in example for example in batch)
        return {
            "pixel_values": torch.stack([e["image"] for e in batch]),
            "labels": torch.tensor([e["labels"] for e in batch]),
        }

    first, second = two_tasks(masked=False)
    renamed = [
        [{"image": e["pixel_values"], "labels": e["labels"]} for e in data]
        for data in (second.train_dataset, second.eval_dataset)
    ]
    tasks = [first, Task("other", *renamed, data_collator=other)]
    args = arguments(
        tmp_path, max_steps=2, remove_unused_columns=False, gradient_accumulation_steps=2
    )
    config = SequenceConfig(replay_share=0.5)
    result = run_tasks(vit(), tasks, args, CONFIG, sequence_config=config, scenario="task")
    assert result.matrix.num_learnt == 2


def test_a_changed_buffer_and_streams_are_refused(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "02" in args.output_dir:
                raise RuntimeError("stopped")

    options = dict(sequence_config=SequenceConfig(replay_share=0.25), scenario="task")
    args = arguments(tmp_path / "run", save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="stopped"):
        run_tasks(vit(), two_tasks(), args, CONFIG, callbacks=[Stop()], **options)
    path = tmp_path / "run" / "replay.json"
    kept = json.loads(path.read_text())
    (tmp_path / "run" / "02-2-or-3").mkdir(exist_ok=True)
    path.write_text(json.dumps({"2": {"1": [0]}}))
    with pytest.raises(ValueError, match="replays other examples"):
        run_tasks(vit(), two_tasks(), args, CONFIG, **options)
    path.write_text(json.dumps(kept))
    run_tasks(vit(), two_tasks(), args, CONFIG, **options)
    stream = Dataset.from_list(labelled((0, 1), 4)).to_iterable_dataset()
    tasks = [replace(two_tasks(False)[0], train_dataset=stream), two_tasks(False)[1]]
    with pytest.raises(ValueError, match="is a stream"):
        run_tasks(vit(), tasks, arguments(tmp_path / "s", max_steps=1), **options)
