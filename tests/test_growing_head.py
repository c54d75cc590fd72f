"""A head that grows: its rows, what protects them, and what is done about the new ones."""

import math
from dataclasses import replace

import pytest
import torch
from test_tasks import CONFIG, arguments, examples, same_weights, vit
from torch import nn

from hf_ewc import EWCConfig, EWCState, SequenceConfig, Task, run_tasks
from hf_ewc.tasks.growing_head import (
    align_weights,
    classes_so_far,
    correct_bias,
    fitted_bias,
    resize,
)


def three_tasks():
    return [
        Task(f"{a} {b}", examples((a, b)), examples((a, b), 8, seed=1))
        for a, b in [(0, 1), (2, 3), (4, 5)]
    ]


def run(folder, config=None, tasks=None, **settings):
    sequence = SequenceConfig(grow_head=True, **settings)
    args = arguments(folder, max_steps=3)
    return run_tasks(vit(2), tasks or three_tasks(), args, config, sequence_config=sequence)


def test_rows_are_kept_and_new_ones_are_the_models_own_kind():
    model = vit(2)
    before = {name: p.detach().clone() for name, p in model.classifier.named_parameters()}
    model.config.id2label = {0: "cat", 1: "dog"}
    resize(model, 5, seed=3)
    assert torch.equal(model.classifier.weight[:2], before["weight"])
    assert torch.equal(model.classifier.bias[:2], before["bias"])
    assert (model.classifier.bias[2:] == 0).all()
    assert 0 < model.classifier.weight[2:].abs().max() < 0.2
    assert (model.num_labels, model.config.num_labels) == (5, 5)
    assert model.config.id2label[1] == "dog"
    output = model(pixel_values=torch.randn(2, 1, 4, 4), labels=torch.tensor([4, 0]))
    assert output.logits.shape == (2, 5)
    again = vit(2)
    resize(again, 5, seed=3)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    resize(model, 2, seed=0)
    assert torch.equal(model.classifier.weight, before["weight"])


def test_the_head_grows_with_the_tasks_and_new_rows_are_free(tmp_path):
    result = run(tmp_path, CONFIG)
    sizes = [
        type(result.model).from_pretrained(tmp_path / name / "final").classifier.out_features
        for name in ("01-0-1", "02-2-3", "03-4-5")
    ]
    assert sizes == [2, 4, 6]
    state = EWCState.from_pretrained(tmp_path / "02-2-3" / "final")
    grown = state.grow_rows(result.model, ["classifier.weight", "classifier.bias"])
    assert (grown.importance["classifier.weight"][4:] == 0).all()
    assert (grown.importance["classifier.weight"][:4] > 0).any()
    assert result.matrix.num_learnt == 3


def test_a_head_with_names_grows(tmp_path):
    model = vit(2)
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    args = arguments(tmp_path, max_steps=1)
    run_tasks(model, three_tasks(), args, CONFIG, sequence_config=SequenceConfig(grow_head=True))
    assert list(model.config.id2label.values())[:3] == ["cat", "dog", "LABEL_2"]


def test_a_run_goes_on_with_a_head_that_has_grown(tmp_path):
    settings = dict(replay_share=0.25, separated_softmax=True, align_weights=True)
    whole = run(tmp_path / "whole", CONFIG, **settings)
    for count in (1, 2, 3):
        part = run(tmp_path / "part", CONFIG, three_tasks()[:count], **settings)
    assert same_weights(part.model, whole.model)
    assert part.matrix == whole.matrix


def test_separated_softmax_trains_old_and_new_rows_apart(tmp_path):
    """Without replay the old rows of the head get no gradient at all; by hand for one SGD step."""
    tasks = three_tasks()[:2]
    sgd = {"optim": "sgd", "max_steps": 1, "per_device_train_batch_size": 24, "max_grad_norm": 0.0}
    tasks[1] = replace(tasks[1], training_args=sgd)
    first = run(tmp_path, tasks=tasks[:1], separated_softmax=True).model
    resize(first, 4, seed=43)
    found = run(tmp_path, tasks=tasks, separated_softmax=True).model
    assert torch.equal(found.classifier.weight[:2], first.classifier.weight[:2])
    images = torch.stack([e["pixel_values"] for e in tasks[1].train_dataset])
    labels = torch.tensor([e["labels"] for e in tasks[1].train_dataset]) - 2
    nn.functional.cross_entropy(first(pixel_values=images).logits[:, 2:], labels).backward()
    for p, q in zip(first.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach() - 1e-2 * p.grad, rtol=1e-4, atol=1e-7)


def test_aligned_rows_have_the_mean_length_of_the_old(tmp_path):
    plain = run(tmp_path / "a", tasks=three_tasks()[:2]).model.classifier
    aligned = run(tmp_path / "b", tasks=three_tasks()[:2], align_weights=True).model.classifier
    lengths = aligned.weight.norm(dim=1)
    assert lengths[2:].mean().item() == pytest.approx(lengths[:2].mean().item(), rel=1e-5)
    assert torch.equal(aligned.weight[:2], plain.weight[:2])
    factor = aligned.weight[2:] / plain.weight[2:]
    assert factor.std() < 1e-3 * factor.mean()
    assert torch.equal(aligned.bias, plain.bias)


def test_the_fitted_bias_is_the_best_of_a_grid():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 5), torch.randint(0, 5, (40,))
    logits[:, 3:] += 2.0
    alpha, beta = fitted_bias(logits, labels, 3)

    def loss(a, b):
        corrected = torch.cat([logits[:, :3], a * logits[:, 3:] + b], 1).double()
        prior = 0.5 * math.log(a) ** 2 + 0.5 * b**2
        return nn.functional.cross_entropy(corrected, labels, reduction="sum").item() + prior

    best = min(
        (loss(alpha + da, beta + db), da, db)
        for da in (-0.05, 0.0, 0.05)
        for db in (-0.05, 0.0, 0.05)
    )
    assert best[1:] == (0.0, 0.0)
    assert loss(alpha, beta) < loss(1.0, 0.0)


@pytest.mark.parametrize("count", [2, 10, 40])
def test_a_bias_that_nothing_bounds_stays_small(count):
    """Old and new classes are told apart without an error, whatever α and β."""
    torch.manual_seed(count)
    labels = torch.arange(count) % 4
    logits = torch.randn(count, 4)
    logits[torch.arange(count), labels] += 6
    alpha, beta = fitted_bias(logits, labels, 2)
    assert 0.2 < alpha < 5
    assert abs(beta) < 2


def test_a_corrected_head_has_the_corrected_logits():
    model, images = vit(4), torch.randn(3, 1, 4, 4)
    before = model(pixel_values=images).logits
    correct_bias(model, 2, 0.5, -1.0)
    after = model(pixel_values=images).logits
    torch.testing.assert_close(after[:, :2], before[:, :2])
    torch.testing.assert_close(after[:, 2:], 0.5 * before[:, 2:] - 1.0)
    align_weights(model, 2)
    assert (after[:, :2] == model(pixel_values=images).logits[:, :2]).all()


def test_bias_correction_keeps_examples_out_of_training(tmp_path):
    tasks = three_tasks()[:2]
    known = {
        e["pixel_values"].numpy().tobytes(): k for k, t in enumerate(tasks) for e in t.train_dataset
    }
    rows = []

    def note(model, args, kwargs):
        if model.training:
            rows.append([image.numpy().tobytes() for image in kwargs["pixel_values"]])

    model = vit(2)
    model.register_forward_pre_hook(note, with_kwargs=True)
    sequence = SequenceConfig(grow_head=True, replay_share=0.5, bias_correction_share=0.25)
    args = arguments(tmp_path, num_train_epochs=1)
    result = run_tasks(model, tasks, args, sequence_config=sequence)
    later = [image for batch in rows[3:] for image in batch]
    counts = [sum(known[image] == k for image in set(later)) for k in (0, 1)]
    assert counts == [12 - 3, 24 - 3]  # a quarter of the 12 replayed, and as many new ones
    assert result.matrix.num_learnt == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(align_weights=True), "grow_head=True"),
        (dict(separated_softmax=True), "grow_head=True"),
        (dict(grow_head=True, bias_correction_share=0.1), "takes replayed examples"),
        (dict(grow_head=True, weight_average="mean"), "nothing to be averaged with"),
    ],
)
def test_settings_that_need_others(settings, message):
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**settings)


def test_what_cannot_grow(tmp_path):
    tasks = [replace(three_tasks()[0], classes=(0, 1))]
    with pytest.raises(ValueError, match="tasks with classes="):
        run(tmp_path, tasks=tasks)
    scores = [{"pixel_values": torch.zeros(1, 4, 4), "labels": 0.5}]
    with pytest.raises(ValueError, match="without one integer label"):
        classes_so_far([Task("a", scores, scores)])


def test_l2_sp_leaves_the_rows_of_new_classes_free(tmp_path):
    """A shared head of four classes, two of them for each task."""
    tasks = [
        replace(task, classes=k)
        for task, k in zip(three_tasks()[:2], [(0, 1), (2, 3)], strict=True)
    ]
    sequence = SequenceConfig(l2sp_lambda=1e6)
    args = arguments(tmp_path, max_steps=3, optim="sgd", learning_rate=1e-7, weight_decay=0.0)
    tasks[1] = replace(tasks[1], training_args={"learning_rate": 0.5, "optim": "adamw_torch"})
    result = run_tasks(vit(4), tasks, args, sequence_config=sequence)
    first = type(result.model).from_pretrained(tmp_path / "01-0-1" / "final")
    moved = (result.model.classifier.weight - first.classifier.weight).detach().abs()
    held = run_tasks(vit(4), tasks, replace(args, output_dir=str(tmp_path / "b")))
    free = (held.model.classifier.weight - first.classifier.weight).detach().abs()
    torch.testing.assert_close(moved[2:].mean(), free[2:].mean(), rtol=0.5, atol=0.0)
    assert not moved[:2].any()


def test_l2_sp_leaves_new_rows_free(tmp_path):
    config = EWCConfig(ewc_lambda=0.0, fisher_samples=4)
    result = run(tmp_path, config, three_tasks()[:2], l2sp_lambda=1e6)
    first = type(result.model).from_pretrained(tmp_path / "01-0-1" / "final")
    weight = result.model.classifier.weight
    assert (weight[:2] - first.classifier.weight).abs().max() < (weight[2:]).abs().max()
