"""What changes during a run is taken up; with nothing given, the plain trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples
from tests.training import (
    LAMBDA,
    GradientRecorder,
    arguments,
    difference,
    ewc_trainer,
    expected_penalty,
    expected_pull,
    plain_trainer,
    relative_error,
)

# ---- Changes during a run ----


class AtSteps(TrainerCallback):
    """Calls ``change`` with the model at the end of the first steps."""

    def __init__(self, change: Callable[[nn.Module], None], steps: int = 1) -> None:
        self.change, self.steps = change, steps

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        if args[1].global_step <= self.steps:
            self.change(model)


def test_a_layer_that_is_unfrozen_during_a_run_is_protected(tmp_path: Path) -> None:
    recorder = GradientRecorder()
    change = AtSteps(lambda model: model.lm_head.requires_grad_(True))
    trainer = ewc_trainer("llama", arguments(tmp_path), 4, callbacks=[recorder, change])
    without = GradientRecorder()
    change = AtSteps(lambda model: model.lm_head.requires_grad_(True))
    plain = plain_trainer("llama", arguments(tmp_path), 4, callbacks=[without, change])
    for each in (plain, trainer):
        each.model.lm_head.requires_grad_(False)
        each.train()
    pulls = [difference(a, b) for a, b in zip(recorder.steps, without.steps, strict=True)]
    assert not pulls[0]["lm_head.weight"].any()
    assert relative_error(pulls[1], expected_pull(trainer)) < 1e-5


def test_a_lambda_that_a_callback_changes_is_taken_up(tmp_path: Path) -> None:
    config = EWCConfig(ewc_lambda=LAMBDA)
    trainer = ewc_trainer("llama", arguments(tmp_path), 6, ewc_config=config)

    def double(_: nn.Module) -> None:
        config.ewc_lambda *= 2

    trainer.add_callback(AtSteps(double, steps=2))
    trainer.train()
    logged = [e["ewc_penalty"] for e in trainer.state.log_history if "ewc_penalty" in e]
    assert logged == pytest.approx([logged[0], 2 * logged[0], 4 * logged[0]], rel=1e-5)
    assert trainer.ewc_penalty() == pytest.approx(expected_penalty(trainer, 4 * LAMBDA), rel=1e-5)
    trainer.ewc_config.ewc_lambda = -1.0
    with pytest.raises(ValueError, match="ewc_lambda is -1"):
        trainer.ewc_penalty()


def test_patterns_that_are_changed_in_place_are_taken_up(tmp_path: Path) -> None:
    config = EWCConfig(
        ewc_lambda=LAMBDA, ewc_layer_lambdas={"layers": LAMBDA}, ewc_exclude_modules=["lm_head"]
    )
    recorder, without = GradientRecorder(), GradientRecorder()
    trainer = ewc_trainer("llama", arguments(tmp_path), 4, ewc_config=config, callbacks=[recorder])

    def elsewhere(_: nn.Module) -> None:
        config.ewc_layer_lambdas["layers"] = 2 * LAMBDA
        config.ewc_exclude_modules[0] = "norm"

    trainer.add_callback(AtSteps(elsewhere))
    trainer.train()
    plain_trainer("llama", arguments(tmp_path), 4, callbacks=[without]).train()
    pulls = [difference(a, b) for a, b in zip(recorder.steps, without.steps, strict=True)]
    first, second = expected_pull(trainer), expected_pull(trainer)
    for name in first:
        first[name] *= 0.0 if name == "lm_head.weight" else 1.0
        second[name] *= 0.0 if name == "model.norm.weight" else 2.0 if "layers" in name else 1.0
    assert relative_error(pulls[0], first) < 1e-5
    assert relative_error(pulls[1], second) < 1e-5


@pytest.mark.parametrize(
    "where", [{"ewc_exclude_modules": ["lm_head"]}, {"ewc_target_modules": r".*layers.*"}]
)
def test_modules_that_the_configuration_leaves_free_are_free(
    where: dict[str, Any], tmp_path: Path
) -> None:
    config = EWCConfig(ewc_lambda=LAMBDA, **where)
    recorder, without = GradientRecorder(), GradientRecorder()
    args = arguments(tmp_path)
    trainer = ewc_trainer("llama", args, 4, ewc_config=config, callbacks=[recorder])
    trainer.train()
    plain_trainer("llama", args, 4, callbacks=[without]).train()
    pull = difference(recorder.steps[0], without.steps[0])
    assert not pull["lm_head.weight"].any()
    expected = expected_pull(trainer)
    for name in expected:
        if name == "lm_head.weight" or ("ewc_target_modules" in where and "layers" not in name):
            expected[name] = torch.zeros_like(expected[name])
    assert relative_error(pull, expected) < 1e-5


# ---- With neither configuration nor state ----


def final_weights(make: Callable[[], Trainer]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    trainer = make()
    trainer.train()
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [{k: v for k, v in e.items() if k not in timed} for e in trainer.state.log_history]
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, logs


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_without_configuration_and_state_it_is_the_plain_trainer(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout and shuffling, so random numbers are used alike too."""
    changes = (
        {"attention_dropout": 0.2}
        if kind == "llama"
        else {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    )
    args = arguments(tmp_path, learning_rate=1e-2, gradient_accumulation_steps=2, max_grad_norm=1.0)
    data = Examples(kind, 12)
    plain, plain_logs = final_weights(
        lambda: Trainer(model=MODELS[kind](**changes), args=args, train_dataset=data)
    )
    ours, our_logs = final_weights(
        lambda: EWCTrainer(model=MODELS[kind](**changes), args=args, train_dataset=data)
    )
    assert plain_logs == our_logs
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_a_configuration_without_a_state_trains_as_the_plain_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e-2)
    data = Examples("llama", 12)
    changes = {"attention_dropout": 0.2}
    plain, plain_logs = final_weights(
        lambda: Trainer(model=MODELS["llama"](**changes), args=args, train_dataset=data)
    )
    ours, our_logs = final_weights(
        lambda: EWCTrainer(
            model=MODELS["llama"](**changes), args=args, train_dataset=data, ewc_config=EWCConfig()
        )
    )
    assert plain_logs == our_logs
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
