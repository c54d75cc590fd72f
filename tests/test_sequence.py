"""Ways to go from task to task beside EWC, each held to its definition."""

import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_tasks import CONFIG, arguments, examples, same_weights, two_tasks, vit
from torch import nn
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ewc import EWCConfig, EWCState, Fisher, SequenceConfig, Task, run_tasks
from hf_ewc.tasks.class_mask import ClassMask
from hf_ewc.tasks.head import head_names
from hf_ewc.tasks.l2_sp import with_l2_sp
from hf_ewc.tasks.mixture import Mixture, joint_places, mixed, places_with_replay
from hf_ewc.tasks.replay import interleaved, replayed_in

# ---- The settings ----


def test_the_command_line_and_no_collision():
    parser = HfArgumentParser((TrainingArguments, EWCConfig, SequenceConfig))
    line = "--output_dir x --replay_share 0.05 --frozen_modules vit --keep_models last"
    factors = ["--learning_rate_factors", '{"vit": 0.1}']
    _, _, found = parser.parse_args_into_dataclasses([*line.split(), *factors])
    assert found == SequenceConfig(
        replay_share=0.05,
        frozen_modules=["vit"],
        keep_models="last",
        learning_rate_factors={"vit": 0.1},
    )
    own = {field.name for field in fields(SequenceConfig)}
    for others in (TrainingArguments, Seq2SeqTrainingArguments, EWCConfig):
        assert not own & {field.name for field in fields(others)}
    trl = pytest.importorskip("trl")
    HfArgumentParser((trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, SequenceConfig))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(replay_share=1.5), "replay_share is 1.5"),
        (dict(replay_per_class=-1), "replay_per_class is -1"),
        (dict(replay_share=0.1, replay_size=3), "replay_share is 0.1 and replay_size is 3"),
        (dict(replay_size=3, joint_training=True), "one way"),
        (dict(head_warmup_share="half"), "head_warmup_share is 'half'"),
        (dict(l2sp_lambda=-1.0), "l2sp_lambda"),
        (dict(keep_models="some"), "'all', 'last'"),
        (dict(frozen_modules="(a"), "not a valid regular expression"),
        (dict(learning_rate_factors={"a": -1}), "learning_rate_factors"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**settings)


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


# ---- Joint training ----


def test_joint_training_begins_each_task_with_the_first_weights(tmp_path):
    config = SequenceConfig(joint_training=True)
    args = arguments(tmp_path / "joint", num_train_epochs=1)
    result = run_tasks(vit(), two_tasks(masked=False), args, sequence_config=config)
    tasks = two_tasks(masked=False)
    sources = [task.train_dataset for task in tasks]
    union = Mixture(sources, joint_places([24, 24], 42), tagged=False)
    model = vit()
    args = arguments(tmp_path / "plain", num_train_epochs=1, seed=43)
    Trainer(model=model, args=args, train_dataset=union).train()
    assert same_weights(result.model, model)
    # Started again after the first task it has the same beginning.
    part = run_tasks(
        vit(),
        two_tasks(masked=False)[:1],
        arguments(tmp_path / "part", num_train_epochs=1),
        sequence_config=config,
    )
    assert part.matrix.num_learnt == 1
    args = arguments(tmp_path / "part", num_train_epochs=1)
    again = run_tasks(vit(), two_tasks(masked=False), args, sequence_config=config)
    assert same_weights(again.model, model)


# ---- A task's own arguments, weight and Fisher data ----


def test_a_task_has_arguments_weight_and_fisher_data_of_its_own(tmp_path):
    first, second = two_tasks()
    own = replace(
        second,
        training_args={"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        weight=2.5,
        fisher_dataset=examples((2, 3), 5, seed=3),
    )
    args = arguments(tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1)
    result = run_tasks(vit(), [first, own], args, CONFIG)
    assert [len(task) for task in result.history] == [2, 5]
    assert {entry["learning_rate"] for entry in result.history[1]} == {1e-3}
    record = result.state.tasks[1]
    assert (record.weight, record.num_examples) == (2.5, 5)
    assert args.max_steps == 2
    other = replace(own, training_args={**own.training_args, "max_steps": 6})
    with pytest.raises(ValueError, match=r"(?s)other settings.*max_steps: 5 there, 6 now"):
        run_tasks(vit(), [first, other], args, CONFIG)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(training_args={"epochs": 3}), ValueError, "no training argument"),
        (dict(training_args={"output_dir": "x"}), ValueError, "for the whole run"),
        (dict(training_args={"lr_scheduler_type": "zigzag"}), ValueError, "zigzag"),
        (dict(training_args=["max_steps"]), TypeError, "a dict"),
        (dict(weight=-1), ValueError, "weight -1"),
    ],
)
def test_bad_fields_of_a_task(tmp_path, change, error, message):
    first, second = two_tasks()
    with pytest.raises(error, match=message):
        run_tasks(vit(), [first, replace(second, **change)], arguments(tmp_path), CONFIG)


# ---- What is trained, and how fast ----


@pytest.mark.parametrize(
    "patterns", [dict(frozen_modules=["vit"]), dict(trained_modules=["classifier"])]
)
def test_what_is_frozen_stays_bit_for_bit(tmp_path, patterns):
    before = {name: p.detach().clone() for name, p in vit().named_parameters()}
    config = SequenceConfig(**patterns)
    args = arguments(tmp_path, weight_decay=0.1)
    result = run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("vit"), name
        assert parameter.requires_grad
    assert result.matrix.num_learnt == 2


def test_patterns_that_match_nothing_are_refused(tmp_path):
    for settings in (dict(frozen_modules=["bert"]), dict(learning_rate_factors={"bert": 0.1})):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}.*bert"):
            run_tasks(
                vit(),
                two_tasks(),
                arguments(tmp_path, max_steps=1),
                sequence_config=SequenceConfig(**settings),
            )


def test_the_learning_rate_is_multiplied_by_the_factor(tmp_path):
    options = dict(max_steps=1, optim="sgd", max_grad_norm=0.0, weight_decay=0.0)
    tasks = two_tasks()[:1]
    start = dict(vit().named_parameters())
    plain = run_tasks(vit(), tasks, arguments(tmp_path / "plain", **options)).model
    config = SequenceConfig(learning_rate_factors={"vit": 0.25, "bias": 2.0, "layernorm": 0.0})
    args = arguments(tmp_path / "factors", **options)
    found = dict(run_tasks(vit(), tasks, args, sequence_config=config).model.named_parameters())
    for name, parameter in plain.named_parameters():
        factor = 0.25 if name.startswith("vit") else 1.0
        factor = 2.0 if name.endswith("bias") else factor
        factor = 0.0 if name.startswith("vit.layernorm.") else factor
        expected = start[name] + factor * (parameter - start[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-8)


# ---- Head warm-up ----


class Weights(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.detach().clone() for name, p in model.named_parameters()})


def test_the_first_steps_train_the_head_alone(tmp_path):
    weights = Weights()
    args = arguments(tmp_path, max_steps=10, gradient_accumulation_steps=2, weight_decay=0.1)
    config = SequenceConfig(head_warmup_share=0.28)  # 2.8 of 10 steps: three
    run_tasks(vit(), two_tasks()[:1], args, CONFIG, sequence_config=config, callbacks=[weights])
    start = {name: p.detach() for name, p in vit().named_parameters()}
    assert set(head_names(vit())) == {"classifier.weight", "classifier.bias"}
    for step, now in enumerate(weights.steps):
        moved = {name for name in start if not torch.equal(now[name], start[name])}
        if step < 3:
            assert moved == {"classifier.weight", "classifier.bias"}
        else:
            assert "vit.encoder.layer.0.attention.attention.query.weight" in moved or len(moved) > 9


def test_warm_up_is_refused_where_an_engine_steps_by_itself(tmp_path):
    class ByItself(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    config = SequenceConfig(head_warmup_share=0.5)
    with pytest.raises(ValueError, match="does not go with DeepSpeed"):
        run_tasks(
            vit(),
            two_tasks(),
            arguments(tmp_path),
            trainer_class=ByItself,
            sequence_config=config,
        )


# ---- L2-SP ----


def test_the_penalty_is_ewcs_plus_half_mu_times_the_square_distance():
    torch.manual_seed(0)
    model = vit()
    names = [name for name, _ in model.named_parameters()]
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    state = EWCState().consolidate(Fisher(importance), model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = EWCConfig(
        ewc_lambda=3.0, ewc_lambda_growth=2.0, ewc_layer_lambdas={"bias": 0.0, "vit.layernorm": 7.0}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    newer = {name: p.detach().clone() for name, p in model.named_parameters()}
    both, settings = with_l2_sp(state, config, model, 0.7, {"classifier.weight": 0})
    only, _ = with_l2_sp(EWCState(), None, model, 0.7, {})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ewc = l2 = ours = 0.0
    lambdas = config.lambdas(names, 1)
    for name, p in model.named_parameters():
        square = (p.detach().double() - newer[name].double()).square().sum()
        l2 += 0.35 * square
        ours += 0.0 if name == "classifier.weight" else 0.35 * square
        distance = p.detach().double() - start[name].double()
        ewc += lambdas[name] / 2 * (importance[name].double() * distance**2).sum()
    assert settings.ewc_lambda == 1.0
    assert both.penalty(model).item() == pytest.approx((ewc + ours).item(), rel=1e-5)
    assert only.penalty(model).item() == pytest.approx(l2.item(), rel=1e-5)


def test_a_run_with_l2_sp_is_held_and_keeps_only_ewcs_state(tmp_path):
    def distance(one, other):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return sum((a - b).square().sum() for a, b in pairs).item()

    args = arguments(tmp_path / "first", max_steps=3)
    first = run_tasks(vit(), two_tasks()[:1], args).model
    found = {}
    for strength in (0.0, 1.0, 100.0):
        args = arguments(tmp_path / str(strength), max_steps=3, optim="sgd", max_grad_norm=0.0)
        config = SequenceConfig(l2sp_lambda=strength)
        tasks = [replace(two_tasks()[0], training_args={"optim": "adamw_torch"}), two_tasks()[1]]
        found[strength] = run_tasks(vit(), tasks, args, sequence_config=config)
    by_strength = [distance(result.model, first) for result in found.values()]
    assert by_strength[0] > by_strength[1] > by_strength[2] > 0
    assert all(result.state is None for result in found.values())
    args = arguments(tmp_path / "both", max_steps=1)
    both = run_tasks(
        vit(), two_tasks(), args, CONFIG, sequence_config=SequenceConfig(l2sp_lambda=1)
    )
    assert [record.name for record in both.state.tasks] == ["0 or 1", "2 or 3"]
    assert max(float(A.max()) for A in both.state.importance.values()) < 1.0
    with pytest.raises(TypeError, match="has no penalty"):
        run_tasks(
            vit(),
            two_tasks(),
            arguments(tmp_path / "plain"),
            trainer_class=Trainer,
            sequence_config=SequenceConfig(l2sp_lambda=1.0),
        )


# ---- What stays on disk ----


def test_only_the_last_model_stays(tmp_path):
    config = SequenceConfig(keep_models="last")
    args = arguments(tmp_path, max_steps=1)
    result = run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("model.safetensors")] == [
        "02-2-or-3/final/model.safetensors"
    ]
    again = run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    assert same_weights(again.model, result.model)
