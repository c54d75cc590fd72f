"""The penalty enters once per optimizer step, however a subclass trains.

The oracle: one step of plain gradient descent of size 1 with EWC and one without, from the same
weights on the same examples; they differ by λ F (θ − θ*), θ the weights before the step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.trainer import EWCMixin, EWCTrainer
from tests.models import Examples, Unused, random_quadratic
from tests.training import (
    GradientRecorder,
    arguments,
    difference,
    expected_penalty,
    expected_pull,
    in_order,
    relative_error,
)

STRENGTH = 3.0


def backward(trainer: Trainer, model: nn.Module, inputs: Any, share: float = 1.0) -> Tensor:
    loss = share * trainer.compute_loss(model, inputs)
    trainer.accelerator.backward(loss / trainer.current_gradient_accumulation_steps)
    return loss.detach()


def perturb(model: nn.Module, size: float, all_of_it: bool = False) -> Callable[[], None]:
    """Move the embedding, or everything, along its gradient; returns what takes that back."""
    moved = list(model.parameters()) if all_of_it else [model.get_parameter("embedding.weight")]
    before = [(p, p.detach().clone()) for p in moved]
    with torch.no_grad():
        for p in moved:
            if p.grad is not None:
                p.add_(p.grad, alpha=size / float(p.grad.norm() + 1e-12))

    def undo() -> None:
        for p, value in before:
            p.data.copy_(value)

    return undo


def fgm(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
    model.train()
    loss = backward(self, model, inputs)
    undo = perturb(model, 0.5)
    backward(self, model, inputs)
    undo()
    return loss


def pgd(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
    """The inner attacks' gradients are thrown away, those of the clean loss are kept."""
    model.train()
    loss = backward(self, model, inputs)
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    undoes = []
    for _ in range(3):
        undoes.append(perturb(model, 0.2))
        model.zero_grad()
        backward(self, model, inputs)
    for n, p in model.named_parameters():
        p.grad = p.grad + kept[n] if n in kept else p.grad
    undoes[0]()
    return loss


def free_lb(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
    model.train()
    losses = []
    undo = None
    for _ in range(3):
        losses.append(backward(self, model, inputs, 1 / 3))
        undone = perturb(model, 0.1)
        undo = undo or undone
    undo()
    return torch.stack(losses).sum()


def sam(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
    model.train()
    before = [p.grad for p in model.parameters()]
    model.zero_grad()
    backward(self, model, inputs)
    undo = perturb(model, 0.05, all_of_it=True)
    model.zero_grad()
    loss = backward(self, model, inputs)
    undo()
    for p, earlier in zip(model.parameters(), before, strict=True):
        if earlier is not None:
            p.grad = p.grad + earlier
    return loss


def plain_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
    model.train()
    return backward(self, model, inputs)


def by_hand(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
    return model(**inputs)["loss"] * 2.0


def after_super(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
    loss = super(type(self), self).training_step(model, inputs, num_items_in_batch)
    undo = perturb(model, 0.5)
    backward(self, model, inputs)
    undo()
    return loss


KINDS: dict[str, dict[str, Any]] = {
    "FGM": {"training_step": fgm},
    "PGD": {"training_step": pgd},
    "FreeLB": {"training_step": free_lb},
    "SAM": {"training_step": sam},
    "FGM after super": {"training_step": after_super},
    "own loss": {"compute_loss": by_hand},
    "own step and loss": {"training_step": plain_step, "compute_loss": by_hand},
}


def stepped(
    trainer_type: type[Trainer], folder: Path, ewc: bool, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Trainer]:
    """The weights after one run, and λ F (θ − θ*) at its start."""
    changes = options.pop("arguments", {})
    model = Unused()
    state = EWCState(*random_quadratic(model))
    if ewc or issubclass(trainer_type, EWCMixin):
        strength = STRENGTH if ewc else 0.0
        options |= {"ewc_config": EWCConfig(ewc_lambda=strength), "ewc_state": state}
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    args = arguments(folder, **{**settings, "max_steps": 1, **changes})
    trainer = trainer_type(model, args, train_dataset=Examples("unused", 8), **options)
    in_order(trainer)
    pull = expected_pull(trainer, STRENGTH) if ewc else {}
    trainer.train()
    return {n: p.detach().double() for n, p in model.named_parameters()}, pull, trainer


def assert_pulled_once(trainer_type: type[Trainer], folder: Path, **options: Any) -> Trainer:
    with_ewc, pull, trainer = stepped(trainer_type, folder, True, **options)
    without, _, _ = stepped(trainer_type, folder, False, **options)
    assert relative_error(difference(without, with_ewc), pull) < 1e-5
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_of_the_trainer_with_ewc(kind: str, accumulation: int, tmp_path: Path) -> None:
    subclass = type("Subclass", (EWCTrainer,), KINDS[kind])
    changes = {"gradient_accumulation_steps": accumulation}
    assert_pulled_once(subclass, tmp_path, arguments=changes)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "FGM after super"])
def test_the_mixin_in_front_of_a_subclass(kind: str, tmp_path: Path) -> None:
    subclass = type("Subclass", (EWCMixin, type("Base", (Trainer,), KINDS[kind])), {})
    assert_pulled_once(subclass, tmp_path)


@pytest.mark.parametrize("kind", ["own step and loss", "SAM"])
def test_the_penalty_is_logged_once_and_clipped(kind: str, tmp_path: Path) -> None:
    subclass = type("Subclass", (EWCTrainer,), KINDS[kind])
    recorder = GradientRecorder()
    changes = {"max_grad_norm": 0.01, "learning_rate": 0.0}
    _, pull, trainer = stepped(subclass, tmp_path, True, arguments=changes, callbacks=[recorder])
    norm = torch.sqrt(sum(g.square().sum() for g in recorder.steps[0].values()))
    assert norm.item() == pytest.approx(0.01, rel=1e-4)
    pull_norm = torch.sqrt(sum(g.square().sum() for g in pull.values())).item()
    (log,) = [entry for entry in trainer.state.log_history if "ewc_penalty" in entry]
    assert log["grad_norm"] > 0.5 * pull_norm
    assert log["ewc_penalty"] == pytest.approx(expected_penalty(trainer, STRENGTH), rel=1e-5)
    assert log["loss"] == pytest.approx(log["task_loss"] + log["ewc_penalty"])


# ---- Steps that the user takes ----


class StepsItself(EWCTrainer):
    """Takes its step at the end of its training step; the Trainer's own then finds no gradient."""

    clips = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        loss = plain_step(self, model, inputs)
        if self.clips:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), 1e-3)
            self.norms = [*getattr(self, "norms", []), float(norm)]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class StepsItselfAfterSuper(EWCTrainer):
    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("kind", [StepsItself, StepsItselfAfterSuper])
def test_a_step_that_the_user_takes(kind: type[EWCTrainer], tmp_path: Path) -> None:
    assert_pulled_once(kind, tmp_path)


def test_a_clipping_by_the_user_sees_the_penalty(tmp_path: Path) -> None:
    clipping = type("Clipping", (StepsItself,), {"clips": True})
    after, pull, trainer = stepped(clipping, tmp_path, True)
    moved = difference({n: p.detach().double() for n, p in Unused().named_parameters()}, after)
    assert sum(m.square().sum() for m in moved.values()) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
    pull_norm = torch.sqrt(sum(g.square().sum() for g in pull.values())).item()
    assert trainer.norms[0] > 0.5 * pull_norm


class TwoOptimizers(EWCTrainer):
    """As for two players: the head's own optimizer steps first, then the Trainer's everything."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        head = model.get_submodule("head")
        if not hasattr(self, "own"):
            self.own = torch.optim.SGD(head.parameters(), lr=0.25)
        backward(self, model, inputs)
        self.own.step()
        self.middle = {f"head.{n}": p.detach().double() for n, p in head.named_parameters()}
        model.zero_grad()
        return backward(self, model, inputs)


def test_each_of_two_optimizers_gets_its_own_share(tmp_path: Path) -> None:
    start = {n: p.detach().double() for n, p in Unused().named_parameters()}
    after, pull, trainer = stepped(TwoOptimizers, tmp_path, True)
    _, _, plain = stepped(TwoOptimizers, tmp_path, False)
    for name, middle in plain.middle.items():
        torch.testing.assert_close(
            middle - trainer.middle[name], 0.25 * pull[name], rtol=1e-4, atol=1e-7
        )
    # The second step starts where the first one ended: the loss there is another one, so the
    # parameters that it does not reach tell.
    torch.testing.assert_close(
        start["other_head.weight"] - after["other_head.weight"],
        pull["other_head.weight"],
        rtol=1e-5,
        atol=1e-7,
    )


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) around another optimizer."""

    def __init__(self, params: Any, lr: float = 1.0, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is None:  # from the Trainer, after a step of the user's own
            return
        moved = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        before = [p.clone() for p in moved]
        for p in moved:
            p.add_(p.grad, alpha=0.05 / float(p.grad.norm() + 1e-12))
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p, value in zip(moved, before, strict=True):
            p.copy_(value)
        self.base_optimizer.step()


class HandsOn(torch.optim.SGD):
    """Evaluates through the step of its base class."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class WithClosure(EWCTrainer):
    """Hands the optimizer a closure that computes gradients anew."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        loss = plain_step(self, model, inputs)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            return backward(self, model, inputs)

        self.optimizer.step(closure)
        self.optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("optimizer", [SAM, torch.optim.SGD, HandsOn])
def test_optimizers_that_compute_gradients_in_their_step(optimizer: Any, tmp_path: Path) -> None:
    assert_pulled_once(WithClosure, tmp_path, optimizer_cls_and_kwargs=(optimizer, {"lr": 1.0}))


def test_an_optimizer_that_goes_without_the_penalty_is_an_error(tmp_path: Path) -> None:
    class Alone(SAM):
        """Does not let its inner optimizer take the step."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.zero_grad()
            assert closure is not None
            torch.enable_grad()(closure)()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad)

    with pytest.raises(RuntimeError, match="took a step with gradients that it computed itself"):
        stepped(WithClosure, tmp_path, True, optimizer_cls_and_kwargs=(Alone, {"lr": 1.0}))


# ---- Callbacks between the last backward pass and the step ----


class Replaces(TrainerCallback):
    """Puts other tensors in place of the gradients, with the same values."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad.clone()


class ComputesAnew(TrainerCallback):
    """Throws the gradients away and computes others, at the same weights."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        model.zero_grad()
        rows = [Examples("unused", 8)[i] for i in (4, 5)]
        inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        model(**inputs)["loss"].backward()


@pytest.mark.parametrize("callback", [Replaces, ComputesAnew])
def test_gradients_that_a_callback_replaces(
    callback: type[TrainerCallback], tmp_path: Path
) -> None:
    assert_pulled_once(EWCTrainer, tmp_path, callbacks=[callback()])


class SkipsSteps(EWCTrainer):
    """As where a gradient scaler finds an overflow: the optimizer's step does not take place."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        made = super().create_optimizer(*args, **kwargs)
        taken, turns = made.step, iter(range(100))
        made.step = lambda *a, **k: taken(*a, **k) if next(turns) != 1 else None
        return made


def test_a_step_that_is_skipped(tmp_path: Path) -> None:
    recorder = GradientRecorder()
    changes = {"max_steps": 3, "learning_rate": 0.0}
    model = Unused()
    trainer = SkipsSteps(
        model,
        arguments(tmp_path, **changes),
        train_dataset=Examples("unused", 2),
        callbacks=[recorder],
        ewc_config=EWCConfig(ewc_lambda=STRENGTH),
        ewc_state=EWCState(*random_quadratic(model)),
    )
    trainer.train()
    first, second, third = recorder.steps
    assert relative_error(second, first) < 1e-6
    assert relative_error(third, first) < 1e-6


def test_parameters_that_are_replaced_during_a_run(tmp_path: Path) -> None:
    class NewHead(TrainerCallback):
        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            model.head = nn.Linear(8, 3)
            kwargs["optimizer"].add_param_group({"params": list(model.head.parameters())})

    with pytest.raises(ValueError, match="were replaced during training"):
        stepped(EWCTrainer, tmp_path, True, callbacks=[NewHead()], arguments={"max_steps": 2})


def test_nothing_is_left_on_torch_and_the_trainer(tmp_path: Path) -> None:
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)
    _, _, trainer = stepped(EWCTrainer, tmp_path, True)
    hooks = len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)
    assert hooks == before
    assert "training_step" not in vars(trainer)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_compute_loss_in_a_callback_keeps_its_meaning(tmp_path: Path) -> None:
    found: list[float] = []

    class Looks(TrainerCallback):
        trainer: EWCTrainer

        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            inputs = self.trainer.data_collator([self.trainer.train_dataset[i] for i in (0, 1)])
            with torch.no_grad():
                task = float(model(**inputs)["loss"])
                found.append(float(self.trainer.compute_loss(model.train(), inputs)) - task)
                found.append(float(self.trainer.compute_loss(model.eval(), inputs)) - task)

    looks = Looks()
    model = Unused()
    looks.trainer = EWCTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=Examples("unused", 4),
        callbacks=[looks],
        ewc_config=EWCConfig(ewc_lambda=STRENGTH),
        ewc_state=EWCState(*random_quadratic(model)),
    )
    looks.trainer.train()
    assert found[0] == pytest.approx(expected_penalty(looks.trainer, STRENGTH), rel=1e-4)
    assert found[1] == 0.0


def by_evolution(self: Any, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
    """Moves along random directions that make the loss smaller, without gradients (MeZO)."""
    with torch.no_grad():
        model.eval()
        losses = []
        for sign in (1.0, -1.0):
            for p in model.parameters():
                p.data.add_(torch.full_like(p, sign * 1e-2))
            losses.append(self.compute_loss(model, inputs))
        for p in model.parameters():
            p.data.sub_(torch.full_like(p, float(losses[0] - losses[1])))
    return losses[0]


def by_itself(self: Any, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
    loss = backward(self, model, inputs)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    model.zero_grad()
    return loss


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [by_evolution, by_itself])
def test_weights_that_a_step_moves_by_itself_are_an_error(
    step: Any, accumulation: int, tmp_path: Path
) -> None:
    kind = type("Own", (EWCTrainer,), {"training_step": step})
    trainer = trainer_of_kind(kind, tmp_path, accumulation)
    with pytest.raises(RuntimeError, match="moved weights that EWC protects by itself"):
        trainer.train()


def decays(self: Any, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
    """Moves weights before the penalty enters, in each part of a window."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.999)
    return EWCTrainer.training_step(self, model, inputs, *args)


def idle(self: Any, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize("step", [decays, idle])
def test_other_steps_are_none(step: Any, tmp_path: Path) -> None:
    kind = type("Own", (EWCTrainer,), {"training_step": step})
    trainer_of_kind(kind, tmp_path, 2).train()


def trainer_of_kind(kind: type[EWCTrainer], folder: Path, accumulation: int) -> EWCTrainer:
    model = Unused()
    return kind(
        model=model,
        args=arguments(folder, gradient_accumulation_steps=accumulation, max_steps=2),
        train_dataset=Examples("unused", 8),
        ewc_config=EWCConfig(ewc_lambda=STRENGTH),
        ewc_state=EWCState(*random_quadratic(model)),
    )
