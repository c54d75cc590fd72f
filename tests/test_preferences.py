"""The Fisher of preferences under TRL's trainers, against a loop over single pairs in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from hf_ewc.config import EWCConfig
from hf_ewc.training.trainer import EWCMixin
from tests.models import VOCAB
from tests.test_trainer_trl import SETTINGS, small_llama, texts, tokenizer
from tests.training import GradientRecorder

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)


class EWCDPOTrainer(EWCMixin, DPOTrainer):
    """DPOTrainer with EWC."""


class EWCRewardTrainer(EWCMixin, RewardTrainer):
    """RewardTrainer with EWC."""


NUMBER = 6


def judge() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, num_labels=1, pad_token_id=0,
            bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


def pairs() -> dict[str, list[str]]:
    chosen = [" w1 w2", " w5", " w6 w7 w8"] * 2
    return {"prompt": texts(NUMBER), "chosen": chosen, "rejected": [" w3 w4", " w9"] * 3}


def looped(model: nn.Module, rows: Any, log_p: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Σ_n (∂ log p_n)² / N, in float64."""
    model = model.double().eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in rows:
        found = torch.autograd.grad(log_p(model, row), list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            total[name] += 0 if gradient is None else gradient**2 / len(rows)
    return total


def assert_close(found: Any, expected: dict[str, Tensor]) -> None:
    top = max(float(value.max()) for value in expected.values())
    assert top > 0
    for name, tensor in expected.items():
        error = (found[name].double() - tensor).abs().max()
        assert error <= 1e-4 * tensor.max() + 1e-9 * top, name


@pytest.mark.parametrize("margin", [False, True])
def test_rewards_are_of_bradley_and_terry(margin: bool, tmp_path: Path) -> None:
    data = {"chosen": [], "rejected": []}
    for prompt, *answers in zip(*pairs().values(), strict=True):
        for side, answer in zip(data, answers, strict=True):
            data[side].append(prompt + answer)
    if margin:
        data["margin"] = [0.1 * i for i in range(NUMBER)]
    trainer = EWCRewardTrainer(
        model=judge(),
        args=RewardConfig(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 1}),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        ewc_config=EWCConfig(fisher_batch_size=4),
    )
    state = trainer.consolidate(name="taste")
    assert state.tasks[0].num_examples == NUMBER

    def log_p(model: nn.Module, row: dict[str, Any]) -> Tensor:
        sides = [torch.tensor([row[f"{side}_ids"]]) for side in ("chosen", "rejected")]
        one, two = (model(input_ids=ids).logits.squeeze() for ids in sides)
        return torch.sigmoid(one - two - row.get("margin", 0.0)).log()

    assert_close(state.importance, looped(judge(), list(trainer.train_dataset), log_p))
    trainer.train()


@pytest.mark.parametrize("how", ["a reference model", "an adapter", "precomputed"])
def test_dpo_has_its_implicit_reward(how: str, tmp_path: Path) -> None:
    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(model, config)

    def policy() -> nn.Module:
        model = small_llama()
        if how == "an adapter":
            return adapted(model)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        return model

    precomputed = {"precompute_ref_log_probs": True} if how == "precomputed" else {}
    trainer = EWCDPOTrainer(
        model=policy(),
        ref_model=None if how == "an adapter" else small_llama(),
        args=DPOConfig(
            output_dir=str(tmp_path), max_length=32, beta=0.3, **SETTINGS, **precomputed
        ),
        train_dataset=Dataset.from_dict(pairs()),
        processing_class=tokenizer(),
        ewc_config=EWCConfig(fisher_batch_size=4),
    )
    state = trainer.consolidate(name="taste")
    assert state.tasks[0].num_examples == NUMBER
    # An adapter that is given goes on, so that TRL keeps a copy of it as the reference.
    reference = (policy() if how == "an adapter" else small_llama()).double().eval()

    def of_answer(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
        ids = torch.tensor([prompt + answer])
        logs = model(input_ids=ids).logits.log_softmax(-1)
        places = range(len(prompt), ids.shape[1])
        return torch.stack([logs[0, i - 1, ids[0, i]] for i in places]).sum()

    def log_p(model: nn.Module, row: dict[str, Any]) -> Tensor:
        def reward(side: str) -> Tensor:
            ids = row["prompt_ids"], row[f"{side}_ids"]
            with torch.no_grad():
                base = of_answer(reference, *ids)
            return 0.3 * (of_answer(model, *ids) - base)

        return torch.sigmoid(reward("chosen") - reward("rejected")).log()

    assert_close(state.importance, looped(policy(), list(trainer.train_dataset), log_p))


@pytest.mark.parametrize("reference", ["the adapter as it was", "no adapter"])
def test_dpo_in_the_space_of_the_weights(reference: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    given = reference == "the adapter as it was"  # TRL keeps a copy of one that is there already

    def trainer_of(kind: type, **options: Any) -> Any:
        torch.manual_seed(1)
        return kind(
            model=get_peft_model(small_llama(), lora) if given else small_llama(),
            args=DPOConfig(output_dir=str(tmp_path), max_length=32, beta=0.3, **SETTINGS),
            train_dataset=Dataset.from_dict(pairs()),
            processing_class=tokenizer(),
            peft_config=None if given else lora,
            **options,
        )

    def adapted(model: Any) -> dict[str, Tensor]:
        """W0 + s B A in float64, by the names of the model without adapters."""
        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
                weight = layer.get_base_layer().weight + layer.scaling["default"] * (b @ a)
                found[f"{name.removeprefix('base_model.model.')}.weight"] = weight
        return found

    settings = {"fisher_batch_size": 4, "ewc_space": "weight", "ewc_lambda": 3.0}
    trainer = trainer_of(EWCDPOTrainer, ewc_config=EWCConfig(**settings))
    state = trainer.consolidate()
    assert len(state.importance) == 4
    merged = small_llama().double().requires_grad_(False)
    for name, weight in adapted(trainer.model).items():
        merged.get_parameter(name).requires_grad_(True).data.copy_(weight)
    before = copy.deepcopy(merged) if given else small_llama().double()

    def of_answer(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
        ids = torch.tensor([prompt + answer])
        logs = model(input_ids=ids).logits.log_softmax(-1)
        return sum(logs[0, i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1]))

    def log_p(model: nn.Module, row: dict[str, Any]) -> Tensor:
        answers = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")]
        with torch.no_grad():
            then = [of_answer(before, *ids) for ids in answers]
        one, two = (of_answer(model, *ids) - t for ids, t in zip(answers, then, strict=True))
        return torch.sigmoid(0.3 * (one - two)).log()

    assert_close(state.importance, looped(merged, list(trainer.train_dataset), log_p))

    def gradients(kind: type, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Those of a step near the anchor, and those of the penalty by autograd."""
        recorder = GradientRecorder()
        again = trainer_of(kind, callbacks=[recorder], **options)
        trained = {n: p for n, p in again.model.named_parameters() if ".default." in n}
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(trainer.model.get_parameter(name))
                parameter.add_(0.05 * torch.randn_like(parameter))
        again.train()
        away = {name: w - state.anchor[name] for name, w in adapted(again.model).items()}
        penalty = 1.5 * sum((state.importance[name] * d**2).sum() for name, d in away.items())
        expected = torch.autograd.grad(penalty, list(trained.values()))
        return recorder.steps[0], dict(zip(trained, expected, strict=True))

    options = {"ewc_config": EWCConfig(**settings), "ewc_state": state}
    found, expected = gradients(EWCDPOTrainer, **options)
    plain, _ = gradients(DPOTrainer)
    assert len(expected) == 8
    for name, gradient in expected.items():
        error = (found[name] - plain[name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss_type": ["ipo"]}, r"loss_type=\['ipo'\].*log_likelihood="),
        ({"use_weighting": True}, r"use_weighting=True.*log_likelihood="),
    ],
)
def test_other_losses_of_pairs_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = EWCDPOTrainer(
        model=small_llama(),
        ref_model=small_llama(),
        args=DPOConfig(output_dir=str(tmp_path), max_length=32, **setting, **SETTINGS),
        train_dataset=Dataset.from_dict(pairs()),
        processing_class=tokenizer(),
        ewc_config=EWCConfig(),
    )
    with pytest.raises(ValueError, match=message):
        trainer.consolidate()
