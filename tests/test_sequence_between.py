"""What happens between tasks: distillation, averages, the gate, the user's own function."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_own_heads import bert, four_tasks
from test_tasks import CONFIG, arguments, same_weights, two_tasks, vit
from torch import nn
from transformers import TrainerCallback

from hf_ewc import EWCConfig, EWCState, EWCTrainer, SequenceConfig, run_tasks
from hf_ewc.tasks import ForgettingError
from hf_ewc.tasks.averaging import Average
from hf_ewc.tasks.distillation import Distillation
from hf_ewc.tasks.label_space import LabelSpace

SGD = dict(max_steps=1, per_device_train_batch_size=24, optim="sgd", max_grad_norm=0.0)

# ---- Distillation ----


def divergence(old, new, temperature):
    """T² mean KL(softmax(old/T) ‖ softmax(new/T)), by enumeration in float64."""
    total = 0.0
    for a, b in zip(old.double() / temperature, new.double() / temperature, strict=True):
        p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        total += (p * (p / q).log()).sum()
    return temperature**2 * total / len(old)


def moved(model, scale=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def quiet(**options):
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)


@pytest.mark.parametrize("known", [None, [0, 2]])
def test_the_term_is_the_divergence_from_the_model_before(known):
    model, images = vit(), torch.randn(5, 1, 4, 4)
    before = model(pixel_values=images).logits.detach()
    tasks = two_tasks(masked=False)
    term = Distillation(model, LabelSpace(model, tasks), tasks[:1], known, 0.5, 3.0)
    moved(model)
    outputs = model(pixel_values=images)
    shown = slice(None) if known is None else known
    expected = 0.5 * divergence(before[:, shown], outputs.logits[:, shown], 3.0)
    found = term(model, {"pixel_values": images, "labels": torch.zeros(5).long()}, outputs)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.training


def test_the_term_sees_the_classes_of_earlier_tasks_though_the_mask_hides_them():
    model, images = vit(), torch.randn(5, 1, 4, 4)
    before = model(pixel_values=images).logits.detach()
    tasks = two_tasks()
    with LabelSpace(model, tasks) as space:
        term = Distillation(model, space, tasks[:1], None, 1.0, 2.0)
        moved(model)
        free = model(pixel_values=images).logits
        with space.of(tasks[1]):
            found = term(model, {"pixel_values": images}, model(pixel_values=images))
    torch.testing.assert_close(
        found, divergence(before[:, :2], free[:, :2], 2.0).float(), rtol=1e-4, atol=1e-6
    )


def test_the_teacher_of_an_adapter_is_the_adapter_as_it_was():
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2)
    model = get_peft_model(quiet(), config)
    moved(model)  # a fresh adapter changes nothing
    ids = torch.randint(1, 20, (5, 4))
    before = model(input_ids=ids).logits.detach()
    term = Distillation(model, LabelSpace(model, []), four_tasks()[:1], None, 1.0, 2.0)
    parameters = dict(model.named_parameters())
    copied = {n for n in term._teacher if n in parameters}
    assert copied == {n for n, p in parameters.items() if p.requires_grad}
    moved(model)
    outputs = model(input_ids=ids)
    found = term(model, {"input_ids": ids}, outputs)
    torch.testing.assert_close(
        found, divergence(before, outputs.logits, 2.0).float(), rtol=1e-4, atol=1e-6
    )


def test_each_earlier_head_is_distilled_and_stays_as_it_is():
    model, tasks = quiet(), four_tasks()
    ids = torch.randint(1, 20, (5, 4))
    space = LabelSpace(model, tasks, seed=3)
    before = {}
    for task in tasks:
        with space.of(task):
            before[task.name] = model(input_ids=ids).logits.detach()
    space.put(tasks[3])
    term = Distillation(model, space, tasks[:3], None, 1.0, 2.0)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = 0.0
    for task in tasks[:3]:
        with space.of(task):
            now = model(input_ids=ids).logits
        if task.name == "number":
            expected = expected + (now - before[task.name]).square().mean()
        else:
            expected = expected + divergence(before[task.name], now, 2.0)
    found = term(model, {"input_ids": ids}, model(input_ids=ids))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    found.backward()
    heads = space.heads._heads.values()
    assert all(p.grad is None for h in heads for m in h.modules.values() for p in m.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_has_the_gradient_of_task_and_term(tmp_path, accumulation):
    """One SGD step of a run, against the gradient of L + weight · T² KL by hand."""
    options = dict(scenario="task", sequence_config=SequenceConfig(distillation_weight=2.0))
    size = 24 // accumulation
    args = arguments(
        tmp_path,
        **{**SGD, "per_device_train_batch_size": size},
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
    )
    first = run_tasks(vit(), two_tasks()[:1], args, **options).model
    start = {name: p.detach().clone() for name, p in first.named_parameters()}
    # The first step is at the teacher, where the term and its gradient are 0: take two.
    tasks = [two_tasks()[0], replace(two_tasks()[1], training_args={"max_steps": 2})]
    found = run_tasks(vit(), tasks, args, **options).model
    images = torch.stack([e["pixel_values"] for e in tasks[1].train_dataset])
    labels = torch.tensor([e["labels"] for e in tasks[1].train_dataset]) - 2
    teacher = first(pixel_values=images).logits.detach()
    for _ in range(2):
        logits = first(pixel_values=images).logits
        loss = nn.functional.cross_entropy(logits[:, 2:], labels)
        loss = loss + 2.0 * divergence(teacher[:, :2], logits[:, :2], 2.0)
        gradients = torch.autograd.grad(loss, list(first.parameters()))
        with torch.no_grad():
            for p, gradient in zip(first.parameters(), gradients, strict=True):
                p.sub_(1e-2 * gradient)
    for (name, p), q in zip(first.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-7)
        assert not torch.equal(q, start[name]) or "key.bias" in name


# ---- Averages ----


def test_the_average_of_two_tasks(tmp_path):
    tasks = two_tasks()
    first = run_tasks(vit(), tasks[:1], arguments(tmp_path / "first")).model
    plain = run_tasks(vit(), tasks, arguments(tmp_path / "plain")).model
    for kind, alpha in (("mean", 0.5), ("constant", 0.25)):
        config = SequenceConfig(weight_average=kind, weight_average_alpha=0.25)
        args = arguments(tmp_path / kind)
        found = run_tasks(vit(), tasks, args, sequence_config=config)
        own = dict(first.named_parameters()), dict(plain.named_parameters())
        for name, p in found.model.named_parameters():
            a, b = own[0][name], own[1][name]
            expected = (1 - alpha) * a + alpha * b
            if name.startswith("classifier"):  # 2 and 3 are new: nothing to average them with
                expected = torch.cat([expected[:2], b[2:]])
            torch.testing.assert_close(p.detach(), expected)
        saved = type(found.model).from_pretrained(tmp_path / kind / "02-2-or-3" / "final")
        assert same_weights(saved, found.model)


def test_the_state_is_anchored_at_the_average(tmp_path):
    config = SequenceConfig(weight_average="mean")
    result = run_tasks(
        vit(), two_tasks(), arguments(tmp_path, max_steps=2), CONFIG, sequence_config=config
    )
    for name, parameter in result.model.named_parameters():
        assert torch.equal(result.state.anchor[name], parameter), name


def test_the_average_that_the_fishers_weigh(tmp_path):
    tasks, options = two_tasks(), dict(ewc_mode="separate", fisher_samples=8, ewc_lambda=0.0)
    plain = run_tasks(vit(), tasks, arguments(tmp_path / "a", max_steps=3), EWCConfig(**options))
    first = EWCState.from_pretrained(tmp_path / "a" / "01-0-or-1" / "final")
    config = SequenceConfig(weight_average="fisher")
    args = arguments(tmp_path / "b", max_steps=3)
    found = run_tasks(vit(), tasks, args, EWCConfig(**options), sequence_config=config)
    now = dict(plain.model.named_parameters())
    for name, parameter in found.model.named_parameters():
        one, both = first.importance[name], plain.state.importance[name]
        share = torch.where(both > 0, (both - one) / both, 1.0)
        expected = first.anchor[name] + share * (now[name].detach() - first.anchor[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="ewc_mode='separate'"):
        run_tasks(vit(), tasks, arguments(tmp_path / "c"), CONFIG, sequence_config=config)


def test_a_running_mean_over_three():
    model = nn.Linear(1, 1, bias=False)
    found = []
    with torch.no_grad():
        for index, value in enumerate([6.0, 12.0, 30.0]):
            mean = Average(model, 1 / (index + 1), {})
            model.weight.fill_(value)
            mean.apply(model)
            found.append(model.weight.item())
    assert found == pytest.approx([6.0, 9.0, 16.0])


# ---- The gate ----


def gated(folder, retries, allowed=0.2, **options):
    config = SequenceConfig(max_forgetting=allowed, gate_retries=retries, gate_factor=10.0)
    return run_tasks(
        vit(),
        two_tasks(),
        arguments(folder, max_steps=2, save_strategy="steps", save_steps=1),
        EWCConfig(ewc_lambda=10.0, fisher_samples=8),
        trainer_class=Strength,
        sequence_config=config,
        **options,
    )


class Strength(EWCTrainer):
    """Says how well the first task is kept after the second: the better, the larger λ is."""

    def train(self, *args, **kwargs):
        self.trained_with = self.ewc_config.ewc_lambda
        return super().train(*args, **kwargs)

    def evaluate(self, *args, metric_key_prefix="eval", **kwargs):
        found = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        is_later = "02" in self.args.output_dir and metric_key_prefix == "eval_0 or 1"
        kept = min(1.0, getattr(self, "trained_with", 0.0) / 1000)
        found[f"{metric_key_prefix}_accuracy"] = kept if is_later else 1.0
        return found


def test_too_much_lost_stops_the_run_and_keeps_the_model_before(tmp_path):
    with pytest.raises(ForgettingError, match=r"(?s)'2 or 3'.*0\.2.*'0 or 1' 1 → 0\.01.*01-0-or-1"):
        gated(tmp_path, retries=0)
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["metrics"]) == 1
    assert content["tries"][0]["lost"] == {"0 or 1": [1.0, 0.01]}
    assert (tmp_path / "01-0-or-1" / "final" / "model.safetensors").is_file()
    assert not (tmp_path / "02-2-or-3" / "final").exists()
    # With the same gate it stops at once, with another it goes on.
    with pytest.raises(ForgettingError):
        gated(tmp_path, retries=0, callbacks=[Never()])
    assert gated(tmp_path, retries=0, allowed=1.0).matrix.num_learnt == 2


class Never(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a step was taken")


def test_a_task_is_tried_again_with_more_strength(tmp_path):
    result = gated(tmp_path / "gated", retries=2)
    content = json.loads((tmp_path / "gated" / "results.json").read_text())
    assert [entry["factor"] for entry in content["tries"]] == [1.0, 10.0]
    assert result.matrix[1, 0] == 1.0
    # As if the second task had been learnt so from the first on.
    args = arguments(tmp_path / "plain", max_steps=2, save_strategy="steps", save_steps=1)
    config = EWCConfig(ewc_lambda=1000.0, fisher_samples=8)
    plain = run_tasks(vit(), two_tasks(), args, config, trainer_class=Strength)
    assert same_weights(result.model, plain.model)
    with pytest.raises(ForgettingError, match="with 10 times the strength"):
        gated(tmp_path / "few", retries=1)


def test_retries_need_something_to_strengthen(tmp_path):
    config = SequenceConfig(max_forgetting=0.1, gate_retries=1)
    with pytest.raises(ValueError, match="there is neither"):
        run_tasks(vit(), two_tasks(), arguments(tmp_path), sequence_config=config)


# ---- The user's own function ----


def test_the_users_figures_are_kept(tmp_path):
    calls = []

    def after_task(trainer, task, results):
        calls.append(task.name)
        assert trainer.model is results.model
        assert results.matrix.num_learnt == len(results.metrics) == len(calls)
        return {"words": len(task.name), "nested": {"x": 0.5}}

    args = arguments(tmp_path, max_steps=1)
    result = run_tasks(vit(), two_tasks(), args, CONFIG, after_task=after_task)
    assert calls == ["0 or 1", "2 or 3"]
    assert result.figures == [{"words": 6, "nested": {"x": 0.5}}] * 2
    assert json.loads((tmp_path / "results.json").read_text())["figures"] == result.figures
    again = run_tasks(vit(), two_tasks(), args, CONFIG, after_task=after_task)
    assert again.figures == result.figures
    assert len(calls) == 2


def test_a_function_that_failed_is_called_again_and_nothing_is_lost(tmp_path):
    def fails(trainer, task, results):
        raise RuntimeError("out of credit")

    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match="out of credit"):
        run_tasks(vit(), two_tasks(), args, CONFIG, after_task=fails)
    seen = []
    result = run_tasks(
        vit(), two_tasks(), args, CONFIG, after_task=lambda *a: seen.append(a[1].name)
    )
    assert seen == ["0 or 1", "2 or 3"]
    assert result.figures == [{}, {}]
    with pytest.raises(TypeError, match="a dict of figures"):
        run_tasks(
            vit(), two_tasks()[:1], arguments(tmp_path / "b", max_steps=1), after_task=lambda *a: 3
        )
