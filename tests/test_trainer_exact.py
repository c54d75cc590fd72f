"""In one optimizer step the gradient gets exactly λ F (θ − θ*), in every configuration.

The oracle: the gradient that the optimizer gets with EWC, minus the one without (learning rate 0,
same examples), is compared with the formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState, TaskRecord
from hf_ewc.training.loss_scaling import correct_loss_scaling
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples, random_quadratic
from tests.training import (
    LAMBDA,
    GradientRecorder,
    arguments,
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


# ---- compute_loss, as anyone else calls it ----


def batch(trainer: EWCTrainer) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(2)])


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
