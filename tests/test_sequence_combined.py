"""What the ways of a sequence do where several of them meet, each against its definition."""

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from test_own_heads import four_tasks, quiet_bert, task
from test_tasks import arguments, examples, two_tasks, vit
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_ewc import EWCConfig, EWCTrainer, SequenceConfig, Task, run_tasks
from hf_ewc.tasks import ForgettingError, Head, task_run
from hf_ewc.tasks.distillation import Distillation
from hf_ewc.tasks.label_space import LabelSpace


class Noted(TrainerCallback):
    """The weights at the beginning of each training and after each of its steps."""

    def __init__(self):
        self.trainings = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trainings.append([self._copy(model)])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trainings[-1].append(self._copy(model))

    @staticmethod
    def _copy(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- Head warm-up with a penalty ----


@pytest.mark.parametrize("mode", ["online", "separate"])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_the_penalty_moves_nothing_but_the_head_in_warm_up(mode, clipping, tmp_path):
    tasks = [*two_tasks(masked=False), replace(two_tasks(masked=False)[0], name="again")]
    args = arguments(tmp_path, max_steps=4, weight_decay=0.1, max_grad_norm=clipping)
    config = EWCConfig(ewc_lambda=50.0, ewc_mode=mode, fisher_samples=8)
    noted = Noted()
    run_tasks(
        vit(), tasks, args, config, scenario="domain",
        sequence_config=SequenceConfig(head_warmup_share=0.5), callbacks=[noted],
    )  # fmt: skip
    for start, _, warm, _, end in noted.trainings:
        moved = {name for name in start if not torch.equal(start[name], warm[name])}
        assert moved == {"classifier.weight", "classifier.bias"}
        assert not torch.equal(end["vit.layernorm.weight"], warm["vit.layernorm.weight"])


# ---- No mask in training, with examples of earlier tasks ----


class Logits(EWCTrainer):
    """Notes the least logit of all that it trains on."""

    least: ClassVar[list[float]] = []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        if model.training:
            self.least.append(outputs["logits"].detach().min().item())
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", [dict(replay_share=0.5), dict(joint_training=True), {}])
def test_mask_training_is_for_replayed_examples_too(way, masked, tmp_path):
    Logits.least = []
    run_tasks(
        vit(), two_tasks(), arguments(tmp_path, max_steps=2), None, trainer_class=Logits,
        sequence_config=SequenceConfig(**way), mask_training=masked,
    )  # fmt: skip
    assert len(Logits.least) == 4
    assert all((least < -1e3) == masked for least in Logits.least)


# ---- The gate, with heads ----


@pytest.fixture
def failing(monkeypatch):
    """Every try loses too much."""

    def lost(matrix, index, allowed):
        return {"two": (1.0, 0.0)} if index else {}

    monkeypatch.setattr(task_run, "lost", lost)


def gated(folder, **options):
    """Two tasks with heads of their own, the second of which is tried twice."""
    with pytest.raises(ForgettingError):
        run_tasks(
            quiet_bert(), four_tasks()[:2], arguments(folder, max_steps=3),
            EWCConfig(ewc_lambda=10.0, fisher_samples=8), scenario="task",
            sequence_config=SequenceConfig(max_forgetting=0.5, gate_retries=1), **options,
        )  # fmt: skip


@pytest.mark.usefixtures("failing")
def test_a_further_try_begins_with_the_head_as_it_was(tmp_path):
    noted = Noted()
    gated(tmp_path, callbacks=[noted])
    _, first, second = noted.trainings
    assert first[0].keys() == second[0].keys()
    for name, before in first[0].items():
        assert torch.equal(before, second[0][name]), name


class Penalties(EWCTrainer):
    found: ClassVar[list[list[str]]] = []

    def train(self, *args, **kwargs):
        state = self.ewc_state
        names = [] if state is None else [n for n in state.importance if "classifier" in n]
        self.found.append(names)
        return super().train(*args, **kwargs)


@pytest.mark.usefixtures("failing")
def test_a_further_try_is_not_held_to_the_head_of_the_one_that_failed(tmp_path):
    Penalties.found = []
    gated(tmp_path, trainer_class=Penalties)
    assert Penalties.found == [[], [], []]


# ---- Distillation from the model as it was ----


def divergence(teacher, student):
    """4 Σ p (log p − log q) at T = 2, a mean over rows, in float64."""
    log_p, log_q = ((z.double() / 2).log_softmax(-1) for z in (teacher, student))
    return 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_the_teacher_has_the_running_statistics_of_before(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4)
    model = ResNetForImageClassification(config).train()
    images = 3 + 2 * torch.randn(6, 3, 16, 16)
    before = copy.deepcopy(model).eval()(pixel_values=images).logits.detach()
    term = Distillation(model, LabelSpace(model, []), two_tasks(masked=False)[:1], None, 1.0, 2.0)
    for _ in range(3):
        outputs = model(pixel_values=images)  # which moves the statistics
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    found = term(model, {"pixel_values": images}, outputs)
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    torch.testing.assert_close(found.double(), divergence(before, outputs.logits), rtol=1e-4,
                               atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("replay", [False, True], ids=["a shared head", "replay"])
def test_the_teachers_heads_are_those_of_before(replay):
    """A head that the new task trains as well: its own, or with replay any."""
    shared = Head(3, name="shared")
    tasks = [
        task("one", lambda row: int(row[1]) % 3, head=shared),
        task("two", lambda row: int(row[0]) % 2),
        task("new", lambda row: int(row[2]) % 3, head=None if replay else shared),
    ]
    model, ids = quiet_bert(), torch.randint(1, 20, (5, 4))
    space, before = LabelSpace(model, tasks, seed=3), {}
    for each in tasks[:2]:
        with space.of(each):
            before[each.name] = model(input_ids=ids).logits.detach()
    space.put(tasks[2])
    with space.heads.all_registered():
        term = Distillation(model, space, tasks[:2], None, 1.0, 2.0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = term(model, {"input_ids": ids}, model(input_ids=ids))
        assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())
    expected = 0.0
    for each in tasks[:2]:
        with space.of(each):
            expected = expected + divergence(before[each.name], model(input_ids=ids).logits)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)


# ---- Tasks that are only evaluated ----


def test_what_is_only_evaluated_sees_its_own_classes(tmp_path):
    (data,) = (two_tasks()[1].eval_dataset,)
    tasks = [Task("all", examples((0, 1, 2, 3)), examples((0, 1, 2, 3), 16))]
    also = [Task("some", None, data, classes=(2, 3), metric="loss")]
    args = arguments(tmp_path, max_steps=2)
    model = run_tasks(vit(), tasks, args, evaluate_also=also).model.eval()
    images = torch.stack([example["pixel_values"] for example in data])
    labels = torch.tensor([example["labels"] for example in data])
    loss = nn.functional.cross_entropy(model(pixel_values=images).logits[:, 2:], labels - 2)
    results = run_tasks(vit(), tasks, args, evaluate_also=also)
    assert results.metrics[0]["some"]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(classes=(2, 9)), "the model's head has 4"),
        (dict(head=3), "a head of its own, which no task trains"),
        (dict(head=Head(2, name="known")), "the head 'known' of task 'other' is"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(options, message, tmp_path):
    first = replace(
        two_tasks(masked=False)[0], head=Head(4, name="known") if "head" in options else None
    )
    also = [Task("other", None, first.eval_dataset, **options)]
    with pytest.raises(ValueError, match=message):
        run_tasks(vit(), [first], arguments(tmp_path, max_steps=1), evaluate_also=also)
    assert not (tmp_path / "results.json").exists()


# ---- Averages ----


class Last(TrainerCallback):
    """The weights as the last training left them, before any average."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["mean", "constant"])
def test_an_average_with_replay_takes_all_heads(kind, tmp_path):
    """All heads train on replayed examples, here all are older than the third task."""
    tasks = [*four_tasks()[:2], replace(four_tasks()[0], name="again")]
    alpha = 1 / 3 if kind == "mean" else 0.5
    config = SequenceConfig(weight_average=kind, weight_average_alpha=0.5, replay_share=0.5)
    args, last = arguments(tmp_path, max_steps=2), Last()
    run_tasks(quiet_bert(), tasks, args, sequence_config=config, scenario="task", callbacks=[last])
    before = load_file(tmp_path / "02-three" / "final" / "heads.safetensors")
    after = load_file(tmp_path / "03-again" / "final" / "heads.safetensors")
    for part in ("weight", "bias"):
        learnt = {
            f"0.classifier.{part}": last.weights[f"classifier.{part}"],
            f"1.classifier.{part}": last.weights[f"other_heads.1.classifier.{part}"],
        }
        for name, value in learnt.items():
            assert not torch.equal(value, before[name])
            expected = (1 - alpha) * before[name] + alpha * value
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


# ---- EWC on the head alone ----


def test_a_shared_head_alone_is_protected(tmp_path):
    head = Head(3, name="shared")
    tasks = [
        task("one", lambda row: int(row[1]) % 3, head=head),
        task("two", lambda row: int(row[2]) % 3, head=head),
    ]
    Penalties.found = []
    config = EWCConfig(ewc_lambda=5.0, fisher_samples=8, ewc_target_modules=["classifier"])
    run_tasks(
        quiet_bert(), tasks, arguments(tmp_path, max_steps=2), config, scenario="task",
        trainer_class=Penalties,
    )  # fmt: skip
    first, second = Penalties.found
    assert first == []
    assert sorted(second) == ["classifier.bias", "classifier.weight"]
