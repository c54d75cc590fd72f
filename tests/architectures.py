"""Tiny models of many architectures, each with a padded batch of uneven lengths.

Dropout is set in every config that has it: an estimate outside eval mode would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]
ARCHITECTURES: dict[str, Callable[[int], Built]] = {}

LENGTHS = (7, 3, 5, 6, 2, 7, 4, 6)
VOCABULARY = 23
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
)
DECODER: dict[str, Any] = dict(
    SMALL, num_key_value_heads=1, attention_dropout=0.1, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
IMAGE: dict[str, Any] = dict(image_size=8, patch_size=4, num_channels=3, num_labels=3)


def architecture(function: Callable[[int], Built]) -> Callable[[int], Built]:
    ARCHITECTURES[function.__name__] = function
    return function


def build(name: str, examples: int = 5) -> Built:
    """The model in eval mode with weights large enough to matter, and a batch."""
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name](examples)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model, batch


def tokens(examples: int, *, padding_side: str = "right") -> dict[str, Tensor]:
    """input_ids and attention_mask, padded with 0."""
    generator = torch.Generator().manual_seed(2)
    lengths = [LENGTHS[n % len(LENGTHS)] for n in range(examples)]
    width = max(lengths)
    ids = torch.zeros(examples, width, dtype=torch.long)
    mask = torch.zeros(examples, width, dtype=torch.long)
    for n, length in enumerate(lengths):
        place = slice(0, length) if padding_side == "right" else slice(width - length, width)
        ids[n, place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[n, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def classes(examples: int, count: int = 3) -> Tensor:
    return torch.arange(examples) % count


def images(examples: int, size: int = 8) -> dict[str, Tensor]:
    pixels = torch.randn(examples, 3, size, size, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels, "labels": classes(examples)}


def sequence(examples: int) -> dict[str, Tensor]:
    return {**tokens(examples), "labels": classes(examples)}


def language(examples: int, padding_side: str = "right") -> dict[str, Tensor]:
    batch = tokens(examples, padding_side=padding_side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


@architecture
def bert(examples: int) -> Built:
    config = t.BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.1)
    return t.BertForSequenceClassification(config), sequence(examples)


@architecture
def bert_masked(examples: int) -> Built:
    batch = language(examples)
    batch["labels"][:, ::2] = -100
    return t.BertForMaskedLM(t.BertConfig(**SMALL, hidden_dropout_prob=0.1)), batch


@architecture
def bert_tokens(examples: int) -> Built:
    config = t.BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.1)
    batch = language(examples)
    batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] % 3, -100)
    return t.BertForTokenClassification(config), batch


@architecture
def bert_choice(examples: int) -> Built:
    flat = tokens(2 * examples)
    batch = {name: value.view(examples, 2, -1) for name, value in flat.items()}
    config = t.BertConfig(**SMALL, hidden_dropout_prob=0.1)
    return t.BertForMultipleChoice(config), {**batch, "labels": classes(examples, 2)}


@architecture
def roberta(examples: int) -> Built:
    config = t.RobertaConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.1, pad_token_id=0)
    return t.RobertaForSequenceClassification(config), sequence(examples)


@architecture
def distilbert(examples: int) -> Built:
    config = t.DistilBertConfig(
        vocab_size=VOCABULARY, dim=8, hidden_dim=12, n_layers=2, n_heads=2, num_labels=3,
        max_position_embeddings=16, dropout=0.1,
    )  # fmt: skip
    return t.DistilBertForSequenceClassification(config), sequence(examples)


@architecture
def albert(examples: int) -> Built:
    """One layer's weights used at every depth."""
    config = t.AlbertConfig(**SMALL, embedding_size=6, num_labels=3)
    return t.AlbertForSequenceClassification(config), sequence(examples)


@architecture
def deberta(examples: int) -> Built:
    config = t.DebertaV2Config(
        **SMALL, num_labels=3, relative_attention=True, position_buckets=4,
        pos_att_type=["p2c", "c2p"], position_biased_input=False,
    )  # fmt: skip
    return t.DebertaV2ForSequenceClassification(config), sequence(examples)


@architecture
def electra(examples: int) -> Built:
    config = t.ElectraConfig(**SMALL, embedding_size=6, num_labels=3)
    return t.ElectraForSequenceClassification(config), sequence(examples)


@architecture
def modernbert(examples: int) -> Built:
    config = t.ModernBertConfig(
        **SMALL, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    return t.ModernBertForSequenceClassification(config), sequence(examples)


@architecture
def vit(examples: int) -> Built:
    config = t.ViTConfig(**{**SMALL, **IMAGE}, hidden_dropout_prob=0.1)
    return t.ViTForImageClassification(config), images(examples)


@architecture
def deit(examples: int) -> Built:
    return t.DeiTForImageClassification(t.DeiTConfig(**{**SMALL, **IMAGE})), images(examples)


@architecture
def beit(examples: int) -> Built:
    config = t.BeitConfig(
        **{**SMALL, **IMAGE}, use_relative_position_bias=True, layer_scale_init_value=0.1,
        use_absolute_position_embeddings=True,
    )  # fmt: skip
    return t.BeitForImageClassification(config), images(examples)


@architecture
def swin(examples: int) -> Built:
    config = t.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4,
        num_labels=3,
    )  # fmt: skip
    return t.SwinForImageClassification(config), images(examples, 16)


@architecture
def convnext(examples: int) -> Built:
    config = t.ConvNextConfig(
        num_channels=3, patch_size=2, num_stages=2, hidden_sizes=[6, 8], depths=[1, 1],
        num_labels=3, image_size=16, layer_scale_init_value=0.1,
    )  # fmt: skip
    return t.ConvNextForImageClassification(config), images(examples, 16)


@architecture
def resnet(examples: int) -> Built:
    config = t.ResNetConfig(
        embedding_size=6, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return t.ResNetForImageClassification(config), images(examples, 16)


@architecture
def gpt2_tied(examples: int) -> Built:
    config = t.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.1
    )
    return t.GPT2LMHeadModel(config), language(examples)


@architecture
def opt(examples: int) -> Built:
    config = t.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=8, ffn_dim=12, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, word_embed_proj_dim=8, pad_token_id=0,
    )  # fmt: skip
    return t.OPTForCausalLM(config), language(examples)


@architecture
def llama(examples: int) -> Built:
    return t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), language(examples, "left")


@architecture
def llama_tied(examples: int) -> Built:
    config = t.LlamaConfig(**DECODER, tie_word_embeddings=True)
    return t.LlamaForCausalLM(config), language(examples)


@architecture
def llama_sequence(examples: int) -> Built:
    config = t.LlamaConfig(**DECODER, num_labels=3)
    return t.LlamaForSequenceClassification(config), sequence(examples)


@architecture
def qwen(examples: int) -> Built:
    return t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)), language(examples)


@architecture
def gemma(examples: int) -> Built:
    config = t.Gemma2Config(**DECODER, head_dim=4, sliding_window=8)
    return t.Gemma2ForCausalLM(config), language(examples)


@architecture
def phi(examples: int) -> Built:
    return t.PhiForCausalLM(t.PhiConfig(**DECODER)), language(examples)


@architecture
def mixtral(examples: int) -> Built:
    config = t.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return t.MixtralForCausalLM(config), language(examples)


@architecture
def mixtral_eager(examples: int) -> Built:
    config = t.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    model = t.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model, language(examples)


@architecture
def gpt_oss(examples: int) -> Built:
    config = t.GptOssConfig(
        **DECODER, head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return t.GptOssForCausalLM(config), language(examples)


@architecture
def t5(examples: int) -> Built:
    config = t.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_ff=12, num_layers=2, num_heads=2, d_kv=4,
        decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config), translation(examples)


@architecture
def bart(examples: int) -> Built:
    config = t.BartConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=12,
        decoder_ffn_dim=12, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return t.BartForConditionalGeneration(config), translation(examples)


def translation(examples: int) -> dict[str, Tensor]:
    labels = language(examples)["labels"].flip(0)[:, :5].clone()
    labels[:, 0] = 4
    return {**tokens(examples), "labels": labels}


@architecture
def llama_lora(examples: int) -> Built:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    model = get_peft_model(t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), adapter)
    return model, language(examples)


@architecture
def llama_dora(examples: int) -> Built:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    model = get_peft_model(t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), adapter)
    return model, language(examples)


@architecture
def mpnet(examples: int) -> Built:
    return t.MPNetForSequenceClassification(t.MPNetConfig(**SMALL, num_labels=3)), sequence(
        examples
    )


@architecture
def funnel(examples: int) -> Built:
    """Attention scores spelled as einsums of parameters."""
    config = t.FunnelConfig(
        vocab_size=VOCABULARY, block_sizes=[1, 1], num_decoder_layers=1, d_model=8, n_head=2,
        d_head=4, d_inner=12, num_labels=3,
    )  # fmt: skip
    return t.FunnelForSequenceClassification(config), sequence(examples)


@architecture
def xmod(examples: int) -> Built:
    """Adapters for each language, one of them without any example."""
    config = t.XmodConfig(
        **SMALL, num_labels=3, pad_token_id=0, languages=["en_XX", "de_DE"],
        default_language="en_XX",
    )  # fmt: skip
    return t.XmodForSequenceClassification(config), sequence(examples)


@architecture
def gpt_neox(examples: int) -> Built:
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)), language(examples)


@architecture
def falcon(examples: int) -> Built:
    config = t.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        alibi=True, bias=True, parallel_attn=False,
    )  # fmt: skip
    return t.FalconForCausalLM(config), language(examples)


@architecture
def mamba(examples: int) -> Built:
    """No attention: depthwise convolutions and a scan over positions."""
    config = t.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=2, pad_token_id=0
    )
    return t.MambaForCausalLM(config), language(examples)


@architecture
def deepseek(examples: int) -> Built:
    """Low-rank attention, shared and routed experts."""
    config = t.DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": 2}, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, moe_intermediate_size=8, first_k_dense_replace=1, q_lora_rank=6,
        kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_shared_experts=1,
    )  # fmt: skip
    return t.DeepseekV3ForCausalLM(config), language(examples)


@architecture
def jetmoe(examples: int) -> Built:
    """Rows sorted by expert and split, in the attention too."""
    rest = {key: value for key, value in DECODER.items() if key != "num_attention_heads"}
    config = t.JetMoeConfig(**rest, num_local_experts=4, num_experts_per_tok=2, kv_channels=4)
    return t.JetMoeForCausalLM(config), language(examples)


@architecture
def switch(examples: int) -> Built:
    """A mixture in which an expert may get as many rows from each of the first two examples."""
    config = t.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=8, d_ff=12, num_layers=2, num_decoder_layers=2, num_heads=2,
        d_kv=4, decoder_start_token_id=0, num_experts=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, expert_capacity=64,
    )  # fmt: skip
    return t.SwitchTransformersForConditionalGeneration(config), translation(examples)


@architecture
def clip(examples: int) -> Built:
    vision = dict(SMALL, image_size=8, patch_size=4)
    config = t.CLIPConfig(vision_config=vision, text_config=dict(SMALL), num_labels=3)
    return t.CLIPForImageClassification(config), images(examples)


@architecture
def dinov2(examples: int) -> Built:
    """Position embeddings interpolated to the size of the image."""
    config = t.Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        mlp_ratio=2, layerscale_value=0.1, num_labels=3,
    )  # fmt: skip
    return t.Dinov2ForImageClassification(config), images(examples, 16)


@architecture
def mobilenet(examples: int) -> Built:
    config = t.MobileNetV2Config(
        image_size=16, depth_multiplier=0.125, min_depth=4, depth_divisible_by=4,
        finegrained_output=False, num_labels=3,
    )  # fmt: skip
    return t.MobileNetV2ForImageClassification(config), images(examples, 16)


def sounds(examples: int) -> dict[str, Tensor]:
    waves = torch.randn(examples, 64, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(64) < 8 * torch.tensor(LENGTHS)[torch.arange(examples) % 8, None]
    return {
        "input_values": waves * mask,
        "attention_mask": mask.long(),
        "labels": classes(examples),
    }


@architecture
def wav2vec2(examples: int) -> Built:
    """Padding written into hidden states in place, and a weight-normed convolution."""
    config = t.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(3, 2), conv_kernel=(4, 3), num_labels=3,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=6,
    )  # fmt: skip
    return t.Wav2Vec2ForSequenceClassification(config), sounds(examples)


@architecture
def whisper(examples: int) -> Built:
    config = t.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=4, d_model=8, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12,
        decoder_ffn_dim=12, max_source_positions=8, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    features = torch.randn(examples, 4, 16, generator=torch.Generator().manual_seed(5))
    batch = {"input_features": features, "labels": translation(examples)["labels"]}
    return t.WhisperForConditionalGeneration(config), batch


@architecture
def bert_dora(examples: int) -> Built:
    from peft import LoraConfig, get_peft_model

    base, batch = bert(examples)
    adapter = LoraConfig(r=2, target_modules=["word_embeddings", "query", "dense"], use_dora=True)
    return get_peft_model(base, adapter), batch
