"""Trainers with training loops of their own, which call no `training_step`.

The oracle: gradient descent by hand on the loss with λ/2 Σ F (θ − θ*)² written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.trainer import EWCMixin, EWCTrainer
from tests.models import Examples, Unused, random_quadratic
from tests.training import arguments

STRENGTH, RATE, STEPS = 3.0, 0.1, 3


def batches(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    data: Any = trainer.train_dataset
    for i in range(STEPS):
        yield trainer.data_collator([data[2 * i], data[2 * i + 1]])


def by_model(trainer: Trainer, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = trainer.model(**batch)["loss"]
    return loss


def by_compute_loss(trainer: Trainer, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = trainer.compute_loss(trainer.model, batch)
    return loss


def loop(trainer: Any, *args: Any, **kwargs: Any) -> TrainOutput:
    model = trainer.model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for batch in batches(trainer):
        optimizer.zero_grad()
        trainer.loss_of(batch).backward()
        if trainer.clips:
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
    return TrainOutput(STEPS, 0.0, {})


def loop_by_hand(trainer: Any, *args: Any, **kwargs: Any) -> TrainOutput:
    model = trainer.model.train()
    for batch in batches(trainer):
        model.zero_grad()
        trainer.loss_of(batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
    return TrainOutput(STEPS, 0.0, {})


class Behind(Trainer):
    """A trainer with a loop that stands behind the mixin, as PPO's does."""

    train = loop


def kinds(own: Any) -> list[type]:
    return [
        type("OwnTrain", (EWCTrainer,), {"train": own}),
        type("OwnInnerLoop", (EWCTrainer,), {"_inner_training_loop": own}),
        type("Mixed", (EWCMixin, type("Behind", (Trainer,), {"train": own})), {}),
        type("Heir", (type("OwnTrain", (EWCTrainer,), {"train": own}),), {}),
    ]


def made(kind: type, folder: Path, loss: Any, clips: bool = False) -> Any:
    model = Unused()
    attributes = {"loss_of": lambda self, batch: loss(self, batch), "clips": clips}
    return type(kind.__name__, (kind,), attributes)(
        model=model,
        args=arguments(folder, max_steps=STEPS),
        train_dataset=Examples("unused", 2 * STEPS),
        ewc_config=EWCConfig(ewc_lambda=STRENGTH),
        ewc_state=EWCState(*random_quadratic(model)),
    )


def descended(trainer: Any) -> nn.Module:
    """The same steps on a model of its own, by hand."""
    model, state = Unused(), trainer.ewc_state
    model.load_state_dict(trainer.model.state_dict())
    for batch in batches(trainer):
        model.zero_grad()
        loss = model(**batch)["loss"]
        for name, p in model.named_parameters():
            pull = state.importance[name] * (p - state.anchor[name]) ** 2
            loss = loss + STRENGTH / 2 * pull.sum()
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not name.startswith("unused"):
                    p -= RATE * p.grad
    return model


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("loss", [by_model, by_compute_loss])
@pytest.mark.parametrize("kind", kinds(loop), ids=lambda kind: kind.__name__)
def test_a_loop_of_its_own_gets_the_penalty_once(
    kind: type, loss: Any, clips: bool, tmp_path: Path
) -> None:
    trainer = made(kind, tmp_path, loss, clips)
    expected = descended(trainer)
    trainer.train()
    for (name, one), two in zip(
        trainer.model.named_parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)
    trainer.train()  # watched again, from where it begins anew


@pytest.mark.parametrize("loss", [by_model, by_compute_loss])
@pytest.mark.parametrize("kind", kinds(loop_by_hand), ids=lambda kind: kind.__name__)
def test_a_loop_without_an_optimizer_is_an_error(kind: type, loss: Any, tmp_path: Path) -> None:
    trainer = made(kind, tmp_path, loss)
    with pytest.raises(RuntimeError, match="moved weights that EWC protects by itself"):
        trainer.train()


def test_without_a_state_a_loop_is_left_alone(tmp_path: Path) -> None:
    for own in (loop, loop_by_hand):
        for kind in kinds(own):
            trainer = made(kind, tmp_path, by_compute_loss)
            trainer.ewc_state = None
            trainer.train()
            assert not trainer._ewc_is_watched


def test_a_train_around_the_parents(tmp_path: Path) -> None:
    """It has the Trainer's loop, and `compute_loss` in a callback its meaning."""
    found: list[float] = []

    class Around(EWCTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

    class Looks(TrainerCallback):
        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            inputs = next(batches(trainer))
            with torch.no_grad():
                task = float(model(**inputs)["loss"])
                found.append(float(trainer.compute_loss(model.train(), inputs)) - task)
            found.append(trainer.ewc_penalty())

    trainer = made(Around, tmp_path, by_model)
    trainer.add_callback(Looks())
    trainer.train()
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[1] > 0


class ClipsByTorch(EWCTrainer):
    """Clips by torch itself at the end of its step, which the Trainer then takes."""

    calls = staticmethod(clip_grad_norm_)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args)
        if self.accelerator.sync_gradients:
            self.calls(model.parameters(), 1e-3)
        return loss


class ClipsByAttribute(ClipsByTorch):
    calls = staticmethod(lambda *given: torch.nn.utils.clip_grad_norm_(*given))


class ClipsAfterItsBackward(ClipsByTorch):
    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        model.train()
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
        if self.accelerator.sync_gradients:
            clip_grad_norm_(model.parameters(), 1e-3)
        return loss.detach()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [ClipsByTorch, ClipsByAttribute, ClipsAfterItsBackward])
def test_a_users_clipping_by_torch_sees_the_penalty(
    kind: type[EWCTrainer], accumulation: int, tmp_path: Path
) -> None:
    trainer = made(kind, tmp_path, by_model)
    trainer.args.max_steps, trainer.args.learning_rate, trainer.args.optim = 1, RATE, "sgd"
    trainer.args.gradient_accumulation_steps = accumulation
    trainer.accelerator.gradient_accumulation_steps = accumulation
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    pairs = zip(trainer.model.parameters(), before, strict=True)
    moved = sum(float((p.detach() - old).square().sum()) for p, old in pairs) ** 0.5
    assert moved == pytest.approx(RATE * 1e-3, rel=0.05)


class ClipsThenAnew(EWCTrainer):
    """Looks at the norm by a clipping, clears the gradients and computes them anew."""

    to_none = True

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        model.train()
        for turn in range(2):
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            if turn == 0:
                self.accelerator.clip_grad_norm_(model.parameters(), 1e9)
                model.zero_grad(set_to_none=self.to_none)
        return loss.detach()


class ComputesAnew(TrainerCallback):
    """Fills the gradients with 0 where they are, and computes them anew."""

    trainer: Any

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        by_model(self.trainer, next(batches(self.trainer))).backward()


@pytest.mark.parametrize("case", ["to none", "to zero", "in a callback"])
def test_gradients_that_are_cleared_after_the_penalty_entered(case: str, tmp_path: Path) -> None:
    kind = EWCTrainer if case == "in a callback" else ClipsThenAnew
    trainer = made(kind, tmp_path, by_model)
    trainer.to_none = case == "to none"
    trainer.args.max_steps, trainer.args.learning_rate = 1, RATE
    trainer.args.optim, trainer.args.per_device_train_batch_size = "sgd", 2
    trainer.args.lr_scheduler_type = "constant"
    trainer.get_train_dataloader = lambda: list(batches(trainer))[:1]
    if case == "in a callback":
        anew = ComputesAnew()
        anew.trainer = trainer
        trainer.add_callback(anew)
    state, model = trainer.ewc_state, trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_model(trainer, next(batches(trainer))).backward()
    task = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer.train()
    for name, p in model.named_parameters():
        if name in task:
            pull = STRENGTH * state.importance[name] * (before[name] - state.anchor[name])
            expected = before[name] - RATE * (task[name] + pull)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5, msg=name)
