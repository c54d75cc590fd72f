"""Weights that a trainer saved are loaded into a model as it was at first."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_ewc.tasks.heads import Head, Heads
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


@pytest.mark.parametrize("content", [b"", b"cut", b"\xff" * 99, b"[]"], ids=range(4))
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_damaged_weights_are_named(name, content, tmp_path):
    Trainer(model=bert(), args=arguments(tmp_path)).save_model(str(tmp_path / "final"))
    path = tmp_path / "final" / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the weights of this model"):
        load_weights(bert(), tmp_path / "final")


def test_damaged_adapters_are_named(tmp_path):
    Trainer(model=with_adapters(), args=arguments(tmp_path)).save_model(str(tmp_path / "final"))
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="does not hold the weights of this model"):
        load_weights(with_adapters(), tmp_path / "final")


def test_damaged_heads_are_named(tmp_path):
    heads = Heads(bert(), {"a": Head(2)}, 0)
    (tmp_path / "heads.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"heads\.safetensors is damaged"):
        heads.load(tmp_path)


def test_the_newest_whole_checkpoint(tmp_path):
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    for step, content in [(4, '{"global_step": 4}'), (16, '{"global_step": 16}'), (32, '{"glo')]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-16"
