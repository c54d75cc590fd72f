"""Checkpoints of models that `save_pretrained` writes under other names than they have."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ewc import EWCTrainer
from hf_ewc.training.converted_weights import load_converted, needs_conversion

SIZES = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
IMAGES = dict(image_size=4, patch_size=2, num_channels=1)
EXPERTS = dict(num_local_experts=2, num_key_value_heads=2, vocab_size=11)

RENAMED = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, **IMAGES)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32, window_size=4)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)),
}


def trainer_of(kind, model, folder):
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True)
    return kind(model=model, args=args)


def scrambled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", RENAMED)
def test_a_checkpoint_is_loaded_in_full(name, tmp_path):
    model = RENAMED[name]()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert needs_conversion(model, tmp_path)

    trainer = trainer_of(EWCTrainer, scrambled(model), tmp_path)
    random = torch.random.get_rng_state()
    trainer._load_from_checkpoint(str(tmp_path))
    assert same(model, weights)
    assert torch.equal(torch.random.get_rng_state(), random)

    trainer.state.best_model_checkpoint = str(tmp_path)
    scrambled(model)
    trainer._load_best_model()
    assert same(model, weights)


def test_shards_are_loaded_as_well(tmp_path):
    model = RENAMED["vit"]()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert load_converted(scrambled(model), tmp_path)
    assert same(model, weights)


def test_the_plain_trainer_still_needs_this(tmp_path):
    """Should this fail, transformers has mended issue 48805 and `converted_weights` can go."""
    model = RENAMED["vit"]()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    trainer_of(Trainer, scrambled(model), tmp_path)._load_from_checkpoint(str(tmp_path))
    assert not same(model, weights)


def test_others_are_left_to_the_trainer(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=11))
    model.save_pretrained(tmp_path)
    assert not needs_conversion(model, tmp_path)
    assert not load_converted(model, tmp_path)
    assert not needs_conversion(torch.nn.Linear(1, 1), tmp_path)
