"""Tiny models and data sets from fixed seeds, for the tests of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

VOCAB = 50


def bert(**changes: Any) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            **{
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "num_labels": 3,
                **changes,
            },
        )
    )


def vit() -> ViTForImageClassification:
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(**changes: Any) -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            **{
                "max_position_embeddings": 16,
                "bos_token_id": 0,
                "eos_token_id": 0,
                **changes,
            },
        )
    )


class Unused(nn.Module):
    """A module without ``**kwargs`` in its forward, and with a head that it never uses."""

    def __init__(self) -> None:
        set_seed(0)
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, 3)
        self.other_head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids).mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


MODELS = {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama, "unused": Unused}


class Examples(Dataset[dict[str, Tensor]]):
    """``size`` examples for one of MODELS; example i depends on i alone."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.size:
            raise IndexError(i)
        generator = torch.Generator().manual_seed(i)
        if self.kind == "vit":
            return {
                "pixel_values": torch.randn(1, 8, 8, generator=generator),
                "labels": torch.tensor(i % 3),
            }
        ids = torch.randint(1, VOCAB, (6,), generator=generator)
        if self.kind in ("gpt2", "llama"):
            labels = ids.clone()
            labels[: i % 4] = -100
            return {"input_ids": ids, "labels": labels}
        return {"input_ids": ids, "labels": torch.tensor(i % 3)}


def random_quadratic(
    model: nn.Module, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An importance in [0, 1) and an anchor near the model for each trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    importance, anchor = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            importance[name] = torch.rand(parameter.shape, generator=generator)
            anchor[name] = parameter.detach().float() + 0.1 * noise
    return importance, anchor


class Unseen(torch.autograd.Function):
    """(B, T, …) → (T, B, …) by what is no torch function: the first axis is not the batch's."""

    @staticmethod
    def forward(ctx, x):
        values = x.detach().float().numpy().swapaxes(0, 1).copy()
        return torch.from_numpy(values).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.transpose(0, 1)
