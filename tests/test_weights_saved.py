"""Weights that a trainer saved are loaded into a model as it was at first."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_ewc.training.checkpoints import newest_whole_checkpoint
from hf_ewc.training.saved_weights import load_weights
from tests.models import Unused, bert, gpt2, vit
from tests.training import arguments


def with_adapters():
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(bert(), config)
    model.add_adapter("other", config)
    return model


@pytest.mark.parametrize("build", [bert, vit, gpt2, Unused, with_adapters])
def test_every_kind_of_model_gets_its_weights_back(build, tmp_path):
    torch.manual_seed(0)
    trained, fresh = build(), build()
    trainable = {n for n, p in trained.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    Trainer(model=trained, args=arguments(tmp_path)).save_model(str(tmp_path / "final"))
    load_weights(fresh, tmp_path / "final")
    for (name, old), new in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(old, new), name
    assert trainable == {n for n, p in fresh.named_parameters() if p.requires_grad}


def test_weights_of_another_model_or_none_are_refused(tmp_path):
    Trainer(model=bert(), args=arguments(tmp_path)).save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="does not hold the weights of this model"):
            load_weights(gpt2(), folder)


def test_the_newest_whole_checkpoint(tmp_path):
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    for step, content in [(4, '{"global_step": 4}'), (16, '{"global_step": 16}'), (32, '{"glo')]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-16"
