"""Short training runs, and what the optimizer got in each step of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples, bert, random_quadratic

LAMBDA = 3.0


class GradientRecorder(TrainerCallback):
    """The gradients at each ``on_pre_optimizer_step``, in float64, zero where there is none."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append(
            {
                name: (p.grad if p.grad is not None else torch.zeros_like(p)).double().clone()
                for name, p in model.named_parameters()
            }
        )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "seed": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **changes})


def in_order(trainer: Trainer) -> Trainer:
    """Let ``trainer`` take its training examples in order."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def plain_trainer(kind: str, args: TrainingArguments, size: int, **options: Any) -> Trainer:
    return in_order(
        Trainer(model=MODELS[kind](), args=args, train_dataset=Examples(kind, size), **options)
    )


def ewc_trainer(kind: str, args: TrainingArguments, size: int, **options: Any) -> EWCTrainer:
    """An EWCTrainer with a random state around its model, and λ = LAMBDA."""
    model = MODELS[kind]()
    options.setdefault("ewc_config", EWCConfig(ewc_lambda=LAMBDA))
    options.setdefault("ewc_state", EWCState(*random_quadratic(model)))
    trainer = EWCTrainer(model=model, args=args, train_dataset=Examples(kind, size), **options)
    in_order(trainer)
    return trainer


def expected_pull(trainer: EWCTrainer, strength: float = LAMBDA) -> dict[str, Tensor]:
    """λ F (θ − θ*) in float64, of the trainer's model as it is now."""
    importance, anchor = trainer.ewc_state.importance, trainer.ewc_state.anchor
    return {
        name: strength * importance[name].double() * (p.detach().double() - anchor[name].double())
        for name, p in trainer.model.named_parameters()
        if name in importance
    }


def expected_penalty(trainer: EWCTrainer, strength: float = LAMBDA) -> float:
    importance, anchor = trainer.ewc_state.importance, trainer.ewc_state.anchor
    return sum(
        strength / 2 * (importance[name].double() * (p.detach().double() - anchor[name]) ** 2).sum()
        for name, p in trainer.model.named_parameters()
        if name in importance
    ).item()


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖actual − expected‖ / ‖expected‖, over all parameters together."""
    wrong = sum((actual[name] - expected[name]).square().sum() for name in expected)
    return (wrong / sum(tensor.square().sum() for tensor in expected.values())).sqrt().item()


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name] - two[name] for name in one}


def batch(trainer: EWCTrainer) -> dict[str, Tensor]:
    """The first two examples, as the trainer puts them together."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(2)])


def consolidating(folder: Path, data: Any = None, model: nn.Module | None = None) -> EWCTrainer:
    """A trainer that protects what its task taught."""
    return EWCTrainer(
        model=model if model is not None else bert(),
        args=arguments(folder),
        train_dataset=data,
        ewc_config=EWCConfig(ewc_lambda=2.0, fisher_type="empirical"),
    )
