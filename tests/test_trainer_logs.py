"""What training reports: loss = task_loss + ewc_penalty, groups, warnings, the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.penalty_log import PenaltyLog, layer_group
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples, random_quadratic
from tests.training import LAMBDA, arguments, ewc_trainer, expected_penalty, plain_trainer


def history(trainer: Any, key: str) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_loss_is_task_loss_plus_penalty(
    kind: str, accumulation: int, logging_steps: int, tmp_path: Path
) -> None:
    """With learning rate 0 both are known: the plain Trainer's loss, and the formula."""
    changes = {"gradient_accumulation_steps": accumulation, "logging_steps": logging_steps}
    plain = plain_trainer(kind, arguments(tmp_path, **changes), 12)
    plain.model_accepts_loss_kwargs = kind == "llama"
    plain.train()
    trainer = ewc_trainer(kind, arguments(tmp_path, **changes), 12)
    output = trainer.train()
    penalty = expected_penalty(trainer)
    logs = history(trainer, "ewc_penalty")
    assert len(logs) == len(history(plain, "loss")) > 0
    for ours, theirs in zip(logs, history(plain, "loss"), strict=True):
        assert ours["task_loss"] == theirs["loss"]
        assert ours["ewc_penalty"] == pytest.approx(penalty, rel=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"] + penalty, rel=1e-6)
    train_loss = history(plain, "train_loss")[0]["train_loss"] + penalty
    assert output.training_loss == pytest.approx(train_loss, rel=1e-5)
    assert output.metrics["train_loss"] == output.training_loss
    assert trainer.ewc_penalty() == pytest.approx(penalty, rel=1e-5)


def test_the_penalty_in_the_logs_is_the_mean_over_the_steps(tmp_path: Path) -> None:
    args = {"learning_rate": 1e-2, "num_train_epochs": 2}
    every = ewc_trainer("llama", arguments(tmp_path, logging_steps=1, **args), 8)
    every.train()
    fourth = ewc_trainer("llama", arguments(tmp_path, logging_steps=4, **args), 8)
    fourth.train()
    single = [entry["ewc_penalty"] for entry in history(every, "ewc_penalty")]
    assert single[0] > single[-1] > 0
    means = [sum(single[i : i + 4]) / 4 for i in (0, 4)]
    assert [e["ewc_penalty"] for e in history(fourth, "ewc_penalty")] == pytest.approx(means)


def test_the_offset_is_part_of_the_penalty(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    importance, anchor = random_quadratic(model)
    offsets = dict.fromkeys(importance, 0.5)
    trainer = ewc_trainer(
        "llama", arguments(tmp_path), 4, ewc_state=EWCState(importance, anchor, offsets)
    )
    trainer.train()
    penalty = expected_penalty(trainer) + LAMBDA * 0.5 * len(importance)
    assert trainer.ewc_penalty() == pytest.approx(penalty, rel=1e-5)
    assert history(trainer, "ewc_penalty")[0]["ewc_penalty"] == pytest.approx(penalty, rel=1e-5)


class ConsolidatesAfterTwoSteps(TrainerCallback):
    """Notes the penalty before and after."""

    trainer: EWCTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            before = self.trainer.ewc_penalty()
            self.trainer.consolidate(name="between")
            self.penalties = before, self.trainer.ewc_penalty()


def test_a_state_that_changes_between_two_logs_loses_none_of_the_penalty(tmp_path: Path) -> None:
    callback = ConsolidatesAfterTwoSteps()
    args = arguments(tmp_path, learning_rate=0.0, logging_steps=3, max_steps=3)
    config = EWCConfig(LAMBDA, ewc_log_groups=True, ewc_mode="separate")
    trainer = ewc_trainer("bert", args, 12, ewc_config=config)
    callback.trainer = trainer
    trainer.add_callback(callback)
    output = trainer.train()
    before, after = callback.penalties
    assert before > 0
    (logs,) = history(trainer, "ewc_penalty")
    expected = (2 * before + after) / 3
    assert logs["ewc_penalty"] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + expected, rel=1e-6)
    (whole,) = history(trainer, "train_loss")
    assert output.training_loss == whole["train_loss"]
    assert output.training_loss == pytest.approx(logs["loss"], rel=1e-5)
    groups = [v for name, v in logs.items() if name.startswith("ewc_penalty/")]
    offset = trainer.ewc_config.strength * trainer.ewc_state.offset
    assert sum(groups) + offset / 3 == pytest.approx(expected, rel=1e-4)


def test_evaluation_knows_nothing_of_the_penalty(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=1e-2)
    trainer = ewc_trainer("llama", args, 4, eval_dataset=Examples("llama", 8))
    trainer.train()
    for entry in history(trainer, "eval_loss"):
        assert not any("penalty" in key or "task" in key for key in entry)
    plain = plain_trainer("llama", arguments(tmp_path), 4)
    plain.model.load_state_dict(trainer.model.state_dict())
    expected = plain.evaluate(Examples("llama", 8))["eval_loss"]
    assert history(trainer, "eval_loss")[-1]["eval_loss"] == expected


def test_groups_add_up_to_the_penalty(tmp_path: Path) -> None:
    config = EWCConfig(ewc_lambda=LAMBDA, ewc_log_groups=True)
    trainer = ewc_trainer("bert", arguments(tmp_path), 4, ewc_config=config)
    trainer.train()
    entry = history(trainer, "ewc_penalty")[0]
    groups = {key: value for key, value in entry.items() if key.startswith("ewc_penalty/")}
    assert set(groups) == {
        f"ewc_penalty/{name}"
        for name in (
            "bert.embeddings",
            "bert.encoder.layer.0",
            "bert.encoder.layer.1",
            "bert.pooler",
            "classifier",
        )
    }
    assert sum(groups.values()) == pytest.approx(entry["ewc_penalty"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("bert.encoder.layer.3.output.dense.weight", "bert.encoder.layer.3"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings"),
        ("classifier.bias", "classifier"),
        ("scale", "scale"),
        ("base_model.model.model.layers.11.q_proj.lora_A.default.weight",
         "base_model.model.model.layers.11"),
    ],
)  # fmt: skip
def test_layer_group(name: str, group: str) -> None:
    assert layer_group(name) == group


def test_there_is_no_penalty_in_the_logs_without_a_state(tmp_path: Path) -> None:
    trainer = EWCTrainer(
        model=MODELS["llama"](),
        args=arguments(tmp_path),
        train_dataset=Examples("llama", 4),
        ewc_config=EWCConfig(),
    )
    trainer.train()
    assert not history(trainer, "ewc_penalty")
    assert trainer.ewc_penalty() == 0.0


# ---- Warnings ----


def said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


def test_a_penalty_that_outweighs_the_task_for_long(caplog: pytest.LogCaptureFixture) -> None:
    log = PenaltyLog(["weight"])
    for window, (penalty, task) in enumerate([(9.0, 1.0)] * 2 + [(0.5, 1.0)] + [(9.0, 1.0)] * 9):
        for _ in range(20):
            log.add(torch.tensor([penalty]), constant=100.0)
        log.amend({"loss": task})
        assert said(caplog, "outweighed") == (window >= 5)


def test_importances_that_are_all_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["llama"]()
    importance, anchor = random_quadratic(model)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in importance.items()}
    trainer = ewc_trainer("llama", arguments(tmp_path), 4, ewc_state=EWCState(zeros, anchor))
    trainer.train()
    assert said(caplog, "protects nothing") == 1
    assert history(trainer, "ewc_penalty")[0]["ewc_penalty"] == 0.0


def test_an_anchor_that_is_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["llama"]()
    importance, anchor = random_quadratic(model)
    trainer = ewc_trainer("llama", arguments(tmp_path), 4, ewc_state=EWCState(importance, anchor))
    trainer.train()
    assert said(caplog, "far from the model") == 0
    elsewhere = {name: -2 * tensor for name, tensor in anchor.items()}
    trainer.ewc_state = EWCState(importance, elsewhere)
    trainer.train()
    assert said(caplog, "far from the model") == 1


def test_a_checkpoint_that_training_took_far_is_no_other_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    anchor = {name: p.detach().clone() for name, p in MODELS["llama"]().named_parameters()}
    state = EWCState({name: torch.full_like(t, 1e-9) for name, t in anchor.items()}, anchor)

    def trainer() -> EWCTrainer:
        args = arguments(
            tmp_path, learning_rate=2.0, max_steps=3, save_strategy="steps", save_steps=1
        )
        return ewc_trainer("llama", args, 4, ewc_state=state)

    trainer().train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    distances = {
        name: float((p.detach() - anchor[name]).norm() / anchor[name].norm())
        for name, p in resumed.model.named_parameters()
    }
    assert max(distances.values()) > 1
    assert said(caplog, "far from the model") == 0


def test_training_that_does_not_start_at_the_anchor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = EWCTrainer(
        model=MODELS["llama"](),
        args=arguments(tmp_path),
        train_dataset=Examples("llama", 4),
        ewc_config=EWCConfig(),
    )
    trainer.consolidate()
    trainer.train()
    assert said(caplog, "does not start from the weights") == 0
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    trainer.train()
    assert said(caplog, "lm_head.weight is 0.1 times its norm away") == 1


def test_a_penalty_that_is_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    log = PenaltyLog(["weight"])
    for _ in range(3):
        log.add(torch.tensor([torch.nan]))
        log.amend({"loss": 1.0})
    assert said(caplog, "the steps are too long for it") == 1


def test_an_empty_state_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    EWCState().save_pretrained(tmp_path / "state")
    ewc_trainer("llama", arguments(tmp_path), 4, ewc_state=tmp_path / "state")
    assert said(caplog, "is empty and protects nothing") == 1


# ---- Model card ----


def test_the_model_card(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    config = EWCConfig(ewc_lambda=12.5, ewc_lambda_growth=2.0, ewc_layer_lambdas={"mlp": 3.0})
    trainer = EWCTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Examples("llama", 4),
        ewc_config=config,
    )
    trainer.create_model_card()
    assert "Elastic" not in (tmp_path / "README.md").read_text()
    trainer.consolidate(name="first|task")
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(tags=["mine"])
    text = (tmp_path / "README.md").read_text()
    assert "- ewc\n" in text
    assert "- mine\n" in text
    assert text.count("## Elastic Weight Consolidation") == 1
    assert "12.5 × 2 per further task" in text
    assert "first\\|task" in text
    record = trainer.ewc_state.tasks[0]
    assert f"| {record.num_examples} | {record.fisher_type} |" in text
