"""Optimizers, parallelism and settings with which no penalty is possible are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ewc.config import EWCConfig
from hf_ewc.training.refusals import check_supported
from hf_ewc.training.trainer import EWCTrainer
from tests.models import Examples, bert
from tests.training import arguments, consolidating, ewc_trainer


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ewc_target_modules", ["quary"]),
        ("ewc_exclude_modules", ["clasifier"]),
        ("ewc_layer_lambdas", {"enkoder": 1.0}),
    ],
)
def test_patterns_that_match_nothing_are_refused_at_construction(
    field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{field}.* matches no"):
        EWCTrainer(model=bert(), args=arguments(tmp_path), ewc_config=EWCConfig(**{field: value}))


def test_other_types_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ewc_config is a dict"):
        EWCTrainer(model=bert(), args=arguments(tmp_path), ewc_config={"ewc_lambda": 1.0})
    with pytest.raises(TypeError, match="ewc_state is a dict"):
        EWCTrainer(model=bert(), args=arguments(tmp_path), ewc_state={"a": 1})
    trainer = consolidating(tmp_path, Examples("bert", 4))
    with pytest.raises(TypeError, match="goes by keyword"):
        trainer.consolidate("task a")
    with pytest.raises(TypeError, match="a task's name is a string"):
        trainer.consolidate(name=3)
    trainer.consolidate().save_pretrained(tmp_path / "state")
    trainer.ewc_state = None
    assert not trainer.ewc_state
    trainer.ewc_state = tmp_path / "state"
    assert trainer.ewc_state.num_tasks == 1


def test_a_model_without_trainable_parameters(tmp_path: Path) -> None:
    model = bert().requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        consolidating(tmp_path, Examples("bert", 4), model).consolidate()


# ---- Refusals ----


@pytest.mark.parametrize(
    ("optim", "alternative"),
    [
        ("lomo", "adamw_torch"),
        ("adalomo", "adamw_torch"),
        ("galore_adamw_layerwise", "'galore_adamw'"),
        ("apollo_adamw_layerwise", "'apollo_adamw'"),
    ],
)
def test_optimizers_that_step_during_the_backward_pass(
    optim: str, alternative: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=alternative):
        ewc_trainer("bert", arguments(tmp_path, optim=optim, optim_target_modules=["query"]), 4)


def test_an_optimizer_object_that_steps_during_the_backward_pass(tmp_path: Path) -> None:
    class AdaLomo(torch.optim.SGD):
        pass

    optimizer = AdaLomo(bert().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AdaLomo"):
        ewc_trainer("bert", arguments(tmp_path), 4, optimizers=(optimizer, None))


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp(version: int) -> None:
    plugin = SimpleNamespace(fsdp_version=version)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(optim="adamw_torch"),
        optimizer_cls_and_kwargs=None,
        optimizer=None,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )
    if version == 2:
        check_supported(trainer)
        return
    with pytest.raises(ValueError, match="use FSDP2"):
        check_supported(trainer)


@pytest.mark.parametrize("plugin", [{"fsdp_plugin": 2}, {"deepspeed_plugin": 3}])
def test_a_share_of_parts_is_refused(plugin: dict[str, int]) -> None:
    """Which importances are the largest is known of the whole model only."""
    state = SimpleNamespace(
        **{name: SimpleNamespace(fsdp_version=n, zero_stage=n) for name, n in plugin.items()}
    )
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(optim="adamw_torch"),
        optimizer_cls_and_kwargs=None,
        optimizer=None,
        accelerator=SimpleNamespace(state=state),
        ewc_config=EWCConfig(ewc_keep_fraction=0.5),
    )
    with pytest.raises(ValueError, match="picks the largest importances"):
        check_supported(trainer)
    trainer.ewc_config = EWCConfig()
    check_supported(trainer)


def test_without_ewc_nothing_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="lomo")
    EWCTrainer(model=bert(), args=args, train_dataset=Examples("bert", 4))
