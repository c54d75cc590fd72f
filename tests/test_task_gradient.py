"""The gradient of the task, for heads that ignore how many items a window has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ewc.config import EWCConfig
from hf_ewc.training.loss_scaling import correct_loss_scaling
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples
from tests.training import (
    GradientRecorder,
    arguments,
    batch,
    difference,
    ewc_trainer,
    expected_pull,
    in_order,
    relative_error,
)

# ---- Heads that ignore num_items_in_batch ----


def mean_gradient(kind: str, examples: range) -> dict[str, Tensor]:
    """The gradient of the mean loss over these examples in one batch."""
    model = MODELS[kind]()
    data = [Examples(kind, 100)[i] for i in examples]
    model(**{key: torch.stack([example[key] for example in data]) for key in data[0]})[
        "loss"
    ].backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_the_task_gradient_is_the_mean_over_the_window(kind: str, tmp_path: Path) -> None:
    """Also for BERT's head, which takes ``num_items_in_batch`` and ignores it."""
    recorder = GradientRecorder()
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    trainer = ewc_trainer(kind, args, 12, callbacks=[recorder])
    trainer.train()
    pull = expected_pull(trainer)
    for step, examples in zip(recorder.steps, (range(8), range(8, 12)), strict=True):
        assert relative_error(difference(step, pull), mean_gradient(kind, examples)) < 1e-4


def test_the_correction_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path, gradient_accumulation_steps=2), 4)
    trainer.train()
    trainer.train()
    said = [r for r in caplog.records if "num_items_in_batch" in r.getMessage()]
    assert len(said) == 1
    assert trainer.model_accepts_loss_kwargs is False
    other = ewc_trainer("llama", arguments(tmp_path), 4)
    other.train()
    assert other.model_accepts_loss_kwargs is True


def test_the_probe_leaves_mode_and_random_numbers_alone(tmp_path: Path) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path, gradient_accumulation_steps=2), 4)
    model = trainer.model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    correct_loss_scaling(trainer, model, batch(trainer), torch.tensor(2))
    assert trainer.model_accepts_loss_kwargs is False
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


class OwnLoss(EWCTrainer):
    """A compute_loss of the user that hands on to the Trainer's."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_the_correction_holds_for_a_compute_loss_of_the_user(tmp_path: Path) -> None:
    def gradients(trainer_type: type[EWCTrainer]) -> dict[str, Tensor]:
        recorder = GradientRecorder()
        trainer = trainer_type(
            model=MODELS["bert"](),
            args=arguments(tmp_path, gradient_accumulation_steps=4),
            train_dataset=Examples("bert", 8),
            ewc_config=EWCConfig(),
            callbacks=[recorder],
        )
        in_order(trainer).train()
        return recorder.steps[0]

    expected = gradients(EWCTrainer)
    found = gradients(OwnLoss)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_batch_that_does_not_tell_leaves_the_question_open(tmp_path: Path) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path, gradient_accumulation_steps=2), 4)
    untold = {**batch(trainer), "labels": torch.full((2,), -100)}
    assert not correct_loss_scaling(trainer, trainer.model, untold, torch.tensor(2))
    assert trainer.model_accepts_loss_kwargs is True
    assert correct_loss_scaling(trainer, trainer.model, batch(trainer), torch.tensor(2))
    assert trainer.model_accepts_loss_kwargs is False
