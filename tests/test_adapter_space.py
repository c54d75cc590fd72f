"""The space of an adapter's own parameters takes adapters of every kind."""

from __future__ import annotations

from pathlib import Path

import fisher_oracle
import pytest
import torch
from models import Examples, llama
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)

from hf_ewc.config import EWCConfig
from hf_ewc.training.trainer import EWCTrainer
from tests.training import arguments

KINDS: dict[str, PeftConfig] = {
    "IA3": IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "single tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefixes": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.filterwarnings("ignore:The one-backward")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_held_by_its_own_parameters(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), KINDS[kind])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    data = Examples("llama", 4)
    batch = {key: torch.stack([data[i][key] for i in range(4)]) for key in data[0]}
    if kind == "prompts":  # a virtual token predicts the first word
        padded = torch.nn.functional.pad(batch["labels"], (2, 0), value=-100)
        expected = fisher_oracle.empirical(model, {**batch, "labels": padded}, shift=True)
    else:
        expected = fisher_oracle.empirical(model, batch, shift=True)
    trainer = EWCTrainer(
        model,
        arguments(tmp_path, max_steps=1, learning_rate=0.1),
        train_dataset=data,
        ewc_config=EWCConfig(ewc_lambda=1.0, fisher_type="empirical"),
    )
    state = trainer.consolidate()
    labels = (batch["labels"] != -100).sum().item() / 4
    labels = labels if kind == "prompts" else (batch["labels"][:, 1:] != -100).sum().item() / 4
    found = {name: value * labels for name, value in state.importance.items()}
    fisher_oracle.assert_close(found, expected, 1e-4)
    trainer.train()
    assert trainer.ewc_penalty() > 0
