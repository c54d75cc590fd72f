"""In one optimizer step the gradient gets exactly λ F (θ − θ*), in every configuration.

The oracle: the gradient that the optimizer gets with EWC, minus the one without (learning rate 0,
same examples), is compared with the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState, TaskRecord
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples, random_quadratic
from tests.training import (
    LAMBDA,
    GradientRecorder,
    arguments,
    batch,
    difference,
    ewc_trainer,
    expected_penalty,
    expected_pull,
    in_order,
    plain_trainer,
    relative_error,
)

WINDOWS = {"one": (1, 4), "four": (4, 16), "short last window": (4, 12)}
"""Accumulation steps and number of examples (batches of 2)."""


def added_by_ewc(
    kind: str, folder: Path, size: int, options: dict[str, Any] | None = None, **changes: Any
) -> tuple[list[dict[str, Tensor]], EWCTrainer]:
    """What EWC adds to the gradient of each optimizer step, and the trainer."""
    options = options or {}
    args = arguments(folder, **changes)
    without, with_ewc = GradientRecorder(), GradientRecorder()
    plain = plain_trainer(kind, args, size, callbacks=[without], **options)
    trainer = ewc_trainer(kind, args, size, callbacks=[with_ewc], **options)
    # The task's own gradient is compared on equal terms, also where the plain Trainer scales it
    # wrongly (transformers issue 47688); that correction has its own test.
    if kind in ("bert",) and not options and not changes.get("label_smoothing_factor"):
        plain.model_accepts_loss_kwargs = False
    plain.train()
    trainer.train()
    assert len(without.steps) == len(with_ewc.steps) > 0
    return [difference(b, a) for a, b in zip(without.steps, with_ewc.steps, strict=True)], trainer


def assert_exact(
    steps: list[dict[str, Tensor]], trainer: EWCTrainer, tolerance: float = 1e-5
) -> None:
    expected = expected_pull(trainer)
    for step in steps:
        step = {
            name.removeprefix("module.").removeprefix("_orig_mod."): g for name, g in step.items()
        }
        assert relative_error(step, expected) < tolerance


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", MODELS)
def test_models_and_accumulation(kind: str, window: str, tmp_path: Path) -> None:
    accumulation, size = WINDOWS[window]
    steps, trainer = added_by_ewc(kind, tmp_path, size, gradient_accumulation_steps=accumulation)
    assert len(steps) == -(-size // (2 * accumulation))
    assert_exact(steps, trainer)


def mean_of_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / num_items_in_batch


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no average over tokens": {"average_tokens_across_devices": False},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_configurations(kind: str, configuration: str, tmp_path: Path) -> None:
    changes = CONFIGURATIONS[configuration]
    steps, trainer = added_by_ewc(kind, tmp_path, 12, gradient_accumulation_steps=4, **changes)
    assert_exact(steps, trainer)


@pytest.mark.parametrize("kind", ["bert", "unused"])
def test_a_loss_function_of_the_user(kind: str, tmp_path: Path) -> None:
    options = {"compute_loss_func": mean_of_items}
    steps, trainer = added_by_ewc(kind, tmp_path, 12, options, gradient_accumulation_steps=4)
    assert_exact(steps, trainer)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bf16_autocast(kind: str, tmp_path: Path) -> None:
    steps, trainer = added_by_ewc(kind, tmp_path, 12, gradient_accumulation_steps=4, bf16=True)
    assert_exact(steps, trainer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_torch_compile(tmp_path: Path) -> None:
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    steps, trainer = added_by_ewc("bert", tmp_path, 12, gradient_accumulation_steps=4, **changes)
    assert_exact(steps, trainer)


class Scaled(Trainer):
    """A Trainer whose accelerator scales losses, as with fp16 on a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


class EWCScaled(EWCTrainer, Scaled):
    """The same with EWC."""


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_gradient_scaler(max_grad_norm: float, tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_grad_norm=max_grad_norm)
    without, with_ewc = GradientRecorder(), GradientRecorder()
    in_order(
        Scaled(MODELS["llama"](), args, train_dataset=Examples("llama", 12), callbacks=[without])
    ).train()
    model = MODELS["llama"]()
    trainer = EWCScaled(
        model,
        args,
        train_dataset=Examples("llama", 12),
        callbacks=[with_ewc],
        ewc_config=EWCConfig(ewc_lambda=LAMBDA),
        ewc_state=EWCState(*random_quadratic(model)),
    )
    in_order(trainer).train()
    for scaled, both in zip(without.steps, with_ewc.steps, strict=True):
        pull = {name: 1024.0 * tensor for name, tensor in expected_pull(trainer).items()}
        if not max_grad_norm:
            assert relative_error(difference(both, scaled), pull) < 1e-5
        else:
            norm = torch.sqrt(sum((g**2).sum() for g in both.values()))
            assert norm.item() == pytest.approx(max_grad_norm, rel=1e-4)


def test_clipping_and_the_logged_norm_see_the_penalty(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_grad_norm=0.5, logging_steps=1)
    recorder = GradientRecorder()
    trainer = ewc_trainer("llama", args, 4, callbacks=[recorder])
    trainer.train()
    pull = expected_pull(trainer)
    pull_norm = torch.sqrt(sum((g**2).sum() for g in pull.values())).item()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert all(norm > 0.5 * pull_norm for norm in logged)
    for step in recorder.steps:
        norm = torch.sqrt(sum((g**2).sum() for g in step.values()))
        assert norm.item() == pytest.approx(0.5, rel=1e-4)


class OutOfMemoryOnce(TrainerCallback):
    """Fails as a device without memory at the second step of the first attempt."""

    def __init__(self) -> None:
        self.failed = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")


def test_auto_find_batch_size(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True)
    recorder = GradientRecorder()
    oom = OutOfMemoryOnce()
    trainer = ewc_trainer("llama", args, 12, callbacks=[recorder, oom])
    trainer.train()
    assert oom.failed
    assert trainer._train_batch_size < 4
    retry = recorder.steps[2:]
    without = GradientRecorder()
    smaller = arguments(tmp_path, per_device_train_batch_size=trainer._train_batch_size)
    plain_trainer("llama", smaller, 12, callbacks=[without]).train()
    steps = [difference(b, a) for a, b in zip(without.steps, retry, strict=True)]
    assert_exact(steps, trainer)
    logs = [entry for entry in trainer.state.log_history if "ewc_penalty" in entry]
    assert len(logs) == len(retry)


def test_a_parameter_that_the_forward_does_not_use_is_protected(tmp_path: Path) -> None:
    steps, trainer = added_by_ewc("unused", tmp_path, 4)
    expected = expected_pull(trainer)["other_head.weight"]
    assert expected.abs().sum() > 0
    for step in steps:
        torch.testing.assert_close(step["other_head.weight"], expected, rtol=1e-5, atol=1e-9)


def test_packed_and_offloaded_states(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    without, with_ewc = GradientRecorder(), GradientRecorder()
    plain_trainer("llama", args, 8, callbacks=[without]).train()
    state = EWCState(*random_quadratic(MODELS["llama"]())).pack("bfloat16", keep_fraction=0.4)
    config = EWCConfig(ewc_lambda=LAMBDA, ewc_offload=True)
    trainer = ewc_trainer(
        "llama", args, 8, callbacks=[with_ewc], ewc_state=state, ewc_config=config
    )
    trainer.train()
    steps = [difference(b, a) for a, b in zip(without.steps, with_ewc.steps, strict=True)]
    assert_exact(steps, trainer)


def test_lora_adapters_are_what_is_protected(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(MODELS["llama"](), config)

    args, data = arguments(tmp_path, gradient_accumulation_steps=4), Examples("llama", 12)
    without, with_ewc = GradientRecorder(), GradientRecorder()
    in_order(Trainer(adapted(), args, train_dataset=data, callbacks=[without])).train()
    trainer = EWCTrainer(
        adapted(),
        args,
        train_dataset=data,
        callbacks=[with_ewc],
        ewc_config=EWCConfig(ewc_lambda=LAMBDA),
        ewc_state=EWCState(*random_quadratic(adapted())),
    )
    in_order(trainer).train()
    assert all(".lora_" in name for name in trainer.ewc_state.importance)
    steps = [difference(b, a) for a, b in zip(without.steps, with_ewc.steps, strict=True)]
    assert_exact(steps, trainer)


def test_lambda_by_layer_and_by_number_of_tasks(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    without, with_ewc = GradientRecorder(), GradientRecorder()
    plain_trainer("llama", args, 2, callbacks=[without]).train()
    model = MODELS["llama"]()
    state = EWCState(*random_quadratic(model))
    config = EWCConfig(
        ewc_lambda=LAMBDA, ewc_lambda_growth=2.0, ewc_layer_lambdas={"layers.0": 5.0, "mlp": 0.0}
    )
    record = {"num_examples": 1, "fisher_type": "exact", "weight": 1.0, "date": ""}
    tasks = tuple(TaskRecord(name=str(i), **record) for i in range(3))
    state = EWCState(state.importance, state.anchor, tasks=tasks)
    trainer = ewc_trainer(
        "llama", args, 2, callbacks=[with_ewc], ewc_state=state, ewc_config=config
    )
    trainer.train()
    pull = expected_pull(trainer, strength=4.0)
    for name in pull:
        pull[name] *= 5.0 if "layers.0." in name else 0.0 if ".mlp." in name else LAMBDA
    step = difference(with_ewc.steps[0], without.steps[0])
    assert relative_error(step, pull) < 1e-5


@pytest.mark.parametrize("return_outputs", [False, True])
def test_compute_loss_is_the_task_loss_plus_the_penalty_in_training(
    return_outputs: bool, tmp_path: Path
) -> None:
    trainer = ewc_trainer("llama", arguments(tmp_path), 4)
    inputs = batch(trainer)
    trainer.model.train()
    task = trainer.model(**inputs)["loss"].item()
    result = trainer.compute_loss(trainer.model, inputs, return_outputs)
    loss = result[0] if return_outputs else result
    assert loss.item() == pytest.approx(task + expected_penalty(trainer), rel=1e-5)
    own = torch.autograd.grad(trainer.model(**inputs)["loss"], list(trainer.model.parameters()))
    both = torch.autograd.grad(loss, list(trainer.model.parameters()))
    names = [name for name, _ in trainer.model.named_parameters()]
    added = {n: (b - a).double() for n, a, b in zip(names, own, both, strict=True)}
    assert relative_error(added, expected_pull(trainer)) < 1e-5


def test_compute_loss_is_the_task_loss_in_evaluation(tmp_path: Path) -> None:
    trainer = ewc_trainer("llama", arguments(tmp_path), 4)
    inputs = batch(trainer)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    assert loss.item() == trainer.model(**inputs)["loss"].item()
    metrics = trainer.evaluate(Examples("llama", 8))
    plain = plain_trainer("llama", arguments(tmp_path), 4).evaluate(Examples("llama", 8))
    assert metrics["eval_loss"] == plain["eval_loss"]
