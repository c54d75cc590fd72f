"""Settings of EWC in `hyperparameter_search`, and a trainer whose model was replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.trainer_utils import HPSearchBackend

from hf_ewc.config import EWCConfig
from hf_ewc.training.trainer import EWCTrainer
from tests.models import Examples, bert
from tests.training import LAMBDA, arguments, ewc_trainer


@pytest.mark.parametrize("backend", [HPSearchBackend.OPTUNA, HPSearchBackend.WANDB])
def test_a_trial_sets_fields_of_the_configuration(
    backend: HPSearchBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path), 8)
    given = trainer.ewc_config
    values = {"ewc_lambda": 7.0, "ewc_gamma": 0.5, "learning_rate": 0.25}
    optuna = backend == HPSearchBackend.OPTUNA
    trainer.hp_search_backend = backend
    trainer.hp_space = (lambda trial: dict(values)) if optuna else (lambda trial: {})
    trial: Any = SimpleNamespace(params=values) if optuna else dict(values)
    trainer._hp_search_setup(trial)
    assert (trainer.ewc_config.ewc_lambda, trainer.ewc_config.ewc_gamma) == (7.0, 0.5)
    assert trainer.args.learning_rate == 0.25
    assert trainer._trial is trial
    assert given.ewc_lambda == LAMBDA  # the user's own object stays
    assert "ewc_lambda" not in caplog.text
    unit = trainer.ewc_state.penalty(trainer.model).item()
    assert trainer.ewc_penalty() == pytest.approx(7.0 * unit, rel=1e-5)
    trainer._hp_search_setup(None)
    assert trainer.ewc_config.ewc_lambda == 7.0


def test_a_trial_with_a_value_that_is_not_allowed(tmp_path: Path) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path), 8)
    trainer.hp_search_backend = HPSearchBackend.WANDB
    with pytest.raises(ValueError, match="ewc_lambda"):
        trainer._hp_search_setup({"ewc_lambda": -1.0})


def test_a_replaced_model_is_not_protected_while_another_is_trained(tmp_path: Path) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path, max_steps=1), 8)
    trainer.train()
    trainer.train()
    trainer.model = bert()
    before = {name: p.clone() for name, p in trainer.model_wrapped.named_parameters()}
    with pytest.raises(ValueError, match=r"trainer\.model was replaced"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model_wrapped.named_parameters())
    trainer.model_wrapped = trainer.model
    trainer.train()


def test_adapters_put_into_the_trainers_model_are_trained_and_protected(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1, learning_rate=0.1)
    trainer = EWCTrainer(
        model=bert(), args=args, train_dataset=Examples("bert", 8), ewc_config=EWCConfig()
    )
    trainer.model = get_peft_model(trainer.model, LoraConfig(target_modules=["query"]))
    trainer.train()
    state = trainer.consolidate()
    (name,) = (n for n in state.anchor if "lora_B" in n and "layer.0" in n)
    assert state.anchor[name].any()


def test_a_model_that_is_made_for_each_run_is_not_a_replaced_one(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(bert())
        return made[-1]

    trainer = EWCTrainer(
        model_init=make,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=Examples("bert", 8),
        ewc_config=EWCConfig(),
    )
    trainer.train()
    trainer.train()
    assert trainer.model is made[-1]
