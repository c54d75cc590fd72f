"""KL(before ‖ after) on a task's own data, held to the saved models in float64."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from models import Examples, gpt2
from test_tasks import arguments, examples, same_weights, two_tasks, vit
from torch import nn
from transformers import GPT2LMHeadModel, ViTForImageClassification

from hf_ewc import EWCConfig, SequenceConfig, Task, run_tasks
from hf_ewc.tasks import divergence
from hf_ewc.tasks.divergence import divergences, spread

ALL = SequenceConfig(kl_examples=100)
CONFIG = EWCConfig(ewc_lambda=50.0, fisher_samples=8)
FOLDERS = ["01-0-or-1", "02-2-or-3"]


def kl(before, after):
    """Of logits (…, C), in float64, by a library's own."""
    p, q = (torch.distributions.Categorical(logits=z.double()) for z in (before, after))
    return torch.distributions.kl_divergence(p, q)


def by_hand(before, after, task):
    """The mean over all of a task's evaluation examples, on its own classes."""
    images = torch.stack([example["pixel_values"] for example in task.eval_dataset])
    with torch.no_grad():
        logits = [model.double().eval()(images.double()).logits for model in (before, after)]
    if task.classes is not None:
        logits = [z[:, list(task.classes)] for z in logits]
    return kl(*logits).mean().item()


def models_of(folder):
    return [
        vit(),
        *(ViTForImageClassification.from_pretrained(folder / f / "final") for f in FOLDERS),
    ]


# ---- The figure ----


def test_the_divergence_of_each_position():
    generator = torch.Generator().manual_seed(0)
    before, after = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    before[:, 2], after[:, 2] = -1e4, -1e4  # another task's class
    found = divergences(before.log_softmax(-1), after.log_softmax(-1))
    shown = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(found, kl(before[:, shown], after[:, shown]), rtol=1e-4, atol=1e-6)


def test_what_had_no_probability_adds_nothing():
    before = torch.tensor([[0.5, 0.5, 0.0]]).log()
    after = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergences(before, after).item() == pytest.approx(expected)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 9])
def test_positions_are_spread_evenly(most):
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(20, 9, generator=generator) < 0.7
    there[0] = False
    found = spread(there, most)
    assert not (found & ~there).any()
    assert found.sum(1).tolist() == there.sum(1).clamp(max=most).tolist()
    row = spread(torch.ones(1, 9, dtype=torch.bool), 3)[0].nonzero()[:, 0]
    assert row.diff().tolist() == [3, 3]


# ---- Runs ----


@pytest.mark.parametrize("masked", [True, False])
def test_a_run_tells_it_of_each_task(tmp_path, caplog, masked):
    tasks = two_tasks(masked)
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        run_tasks(vit(), tasks, arguments(tmp_path), CONFIG, sequence_config=ALL)
    content = json.loads((tmp_path / "results.json").read_text())
    for k, found in enumerate(content["divergences"]):
        before, after = models_of(tmp_path)[k : k + 2]
        assert found["task"] == tasks[k].name
        assert found["labels"] == 16
        assert found["kl"] == pytest.approx(by_hand(before, after, tasks[k]), rel=1e-4)
        assert found["kl"] > 1e-3
    told = [r.message for r in caplog.records if r.message.startswith("After '")]
    for line, found in zip(told, content["divergences"], strict=True):
        assert f"KL(before ‖ after) on its own data is {found['kl']:.3g} nats a label" in line
    assert content["aftermaths"][0]["kl"] == content["divergences"][1]["kl"]
    report = (tmp_path / "report.md").read_text()
    assert "KL(before ‖ after)" in report
    assert f"{content['divergences'][0]['kl']:.3g} |" in report


def test_it_changes_nothing_and_is_told_without_ewc_too(tmp_path):
    one, two = vit(), vit()
    changes = dict(logging_strategy="steps", logging_steps=1)
    found = run_tasks(one, two_tasks(), arguments(tmp_path / "a", **changes), sequence_config=ALL)
    plain = run_tasks(two, two_tasks(), arguments(tmp_path / "b", **changes))
    assert same_weights(one, two)
    assert [f["loss"] for f in found.metrics[1].values()] == [
        f["loss"] for f in plain.metrics[1].values()
    ]
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [each["labels"] for each in content["divergences"]] == [16, 16]
    assert "divergences" not in json.loads((tmp_path / "b" / "results.json").read_text())


def test_so_many_examples_and_gone_on_with(tmp_path):
    few = SequenceConfig(kl_examples=10)
    tasks = two_tasks()
    run_tasks(vit(), tasks[:1], arguments(tmp_path), CONFIG, sequence_config=few)
    first = json.loads((tmp_path / "results.json").read_text())["divergences"]
    run_tasks(vit(), tasks, arguments(tmp_path), CONFIG, sequence_config=ALL)
    both = json.loads((tmp_path / "results.json").read_text())["divergences"]
    assert both[0] == first[0]
    assert [each["labels"] for each in both] == [10, 16]


def test_what_is_changed_at_random_as_it_is_read_is_the_same_before_and_after(tmp_path):
    class Noisy(list):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return {**example, "pixel_values": example["pixel_values"] + 9 * torch.randn(1, 4, 4)}

    (task, _) = two_tasks()
    task = replace(task, eval_dataset=Noisy(task.eval_dataset))
    args, model = arguments(tmp_path, learning_rate=1e-9), vit()
    nn.init.normal_(model.classifier.weight)  # sure of some
    run_tasks(model, [task], args, sequence_config=ALL)
    (found,) = json.loads((tmp_path / "results.json").read_text())["divergences"]
    assert 0 <= found["kl"] < 1e-6


@pytest.mark.parametrize("most", [1 << 26, 8 * 50 * 2])
def test_of_a_language_model_it_is_a_mean_over_labelled_tokens(tmp_path, monkeypatch, most):
    """With room for two tokens of each of eight texts, these are spread evenly over it."""
    monkeypatch.setattr(divergence, "MOST_NUMBERS", most)
    data = [Examples("gpt2", 8)[i] for i in range(8)]
    task = Task("texts", data, data, metric="perplexity")
    run_tasks(gpt2(), [task], arguments(tmp_path, max_steps=4), sequence_config=ALL)
    after = GPT2LMHeadModel.from_pretrained(tmp_path / "01-texts" / "final")
    terms = []
    for example in data:
        ids, labels = example["input_ids"][None], example["labels"]
        with torch.no_grad():
            each = kl(*(m.eval()(ids).logits[0, :-1] for m in (gpt2(), after)))
        each = each[labels[1:] != -100]
        some = 2 if most < 1 << 26 else len(each)
        terms += [each[math.ceil((j + 1) * len(each) / some) - 1].item() for j in range(some)]
    (found,) = json.loads((tmp_path / "results.json").read_text())["divergences"]
    assert found["labels"] == len(terms)
    assert found["kl"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_yes_or_no_labels_are_a_position_each(tmp_path):
    model = vit()
    model.config.problem_type = "multi_label_classification"
    data = [{**e, "labels": torch.arange(4) % 2 * 1.0} for e in examples((0, 1), 8)]
    task = Task("a", data, data, metric="loss")
    run_tasks(model, [task], arguments(tmp_path), sequence_config=ALL)
    after = ViTForImageClassification.from_pretrained(tmp_path / "01-a" / "final")
    images = torch.stack([example["pixel_values"] for example in data])
    with torch.no_grad():
        p, q = (m.double().eval()(images.double()).logits.sigmoid() for m in (vit(), after))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    (found,) = json.loads((tmp_path / "results.json").read_text())["divergences"]
    assert found["labels"] == 32
    assert found["kl"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_of_a_regression_it_is_not_known(tmp_path, caplog):
    data = [{**e, "labels": float(e["labels"])} for e in examples((0, 1), 8)]
    task = Task("a", data, data, metric="loss")
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        run_tasks(vit(1), [task], arguments(tmp_path, max_steps=1), sequence_config=ALL)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["divergences"] == [{"task": "a", "kl": None, "labels": 0}]
    assert "the divergence on 'a' is not known" in caplog.text


def test_buffers_and_modes_are_as_before():
    norm = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).train()
    norm[1].eval()
    with divergence.evaluating(norm):
        norm(torch.randn(3, 2))
        assert not any(module.training for module in norm.modules())
    assert [module.training for module in norm.modules()] == [True, True, False]
    assert norm[0].num_batches_tracked == 0


def test_it_is_a_number_of_examples():
    with pytest.raises(ValueError, match=r"kl_examples is -1; allowed is an integer of at least 0"):
        SequenceConfig(kl_examples=-1)
