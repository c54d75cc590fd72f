"""Tiny models of every architecture of `transformers`, and a batch for each head.

A configuration is shrunk by the names of its fields, sub-configurations included; `OVERRIDES` holds
what single architectures need beyond that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "CAUSAL_LM",
    "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "CTC",
    "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING",
    "DOCUMENT_QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION",
)  # fmt: skip
EXAMPLES = 3
VOCABULARY = 64
LABELS = 3
MAX_PARAMETERS = 3_000_000

_WIDTHS = (
    "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim emb_dim encoder_hidden_size "
    "d_embed projection_dim text_hidden_size output_hidden_size out_hidden_size "
    "projector_hidden_size output_dim width kv_proj_dim width_per_layer hidden_dim "
    "decoder_hidden_size embedding_size cross_attention_hidden_size downsample_hidden_size "
    "attention_hidden_size fusion_hidden_size n_embed lm_head_hidden model_dim rnn_width "
    "lru_width vision_hidden_size audio_hidden_size hidden_channels pooler_output_size"
)
_INNER = (
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner mlp_dim "
    "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size projector_intermediate_size "
    "intermediate_size_mlp dense_intermediate_size moe_shared_intermediate_size "
    "attention_intermediate_size expert_intermediate_size"
)
_LAYERS = (
    "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers depth "
    "num_decoder_layers num_encoder_layers encoder_num_layers text_num_hidden_layers"
)
_HEADS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads attention_heads num_kv_heads swa_num_attention_heads "
    "swa_num_key_value_heads linear_num_key_heads linear_num_value_heads linear_num_heads "
    "mamba_n_heads index_n_heads num_key_value_heads_per_layer num_attention_groups "
    "encoder_num_attention_heads multi_query_group_num"
)
_HEAD_DIMS = (
    "head_dim d_kv attention_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim "
    "kv_channels dim_head linear_head_dim d_head mamba_d_head qk_rope_head_dim qk_nope_head_dim "
    "v_head_dim index_head_dim global_head_dim attention_head_size query_pre_attn_scalar "
    "rotary_dim qk_head_dim"
)
SHRUNK: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS.split(), 16),
    **dict.fromkeys(_INNER.split(), 24),
    **dict.fromkeys(_LAYERS.split(), 2),
    **dict.fromkeys(_HEADS.split(), 2),
    **dict.fromkeys(_HEAD_DIMS.split(), 8),
    "qk_head_dim": 16, "vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_target_positions": 64,
    "max_source_positions": 32, "num_mel_bins": 8, "image_size": 16, "patch_size": 8,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "index_topk": 64, "sliding_window": 32, "num_filters": 4, "num_feat_extract_layers": 2,
    "conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (4, 3), "classifier_proj_size": 8,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (8, 8, 12),
    "tdnn_kernel": (3, 2, 1), "tdnn_dilation": (1, 1, 1), "xvector_output_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "num_position_embeddings": 16, "attention_window": 4, "relative_attention_max_distance": 16,
    "relative_attention_num_buckets": 8, "num_adapter_layers": 1, "num_frames": 2,
    "num_kv_shared_layers": 0, "mamba_d_state": 4, "state_size": 4, "ssm_state_size": 4,
    "num_nextn_predict_layers": 0, "chunk_size": 4, "mamba_chunk_size": 4, "max_window_layers": 1,
    "block_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
    "cls_token_id": 1, "mask_token_id": 3, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "forced_bos_token_id": None,
    "max_2d_position_embeddings": 32, "coordinate_size": 4, "shape_size": 4,
}  # fmt: skip
_WIDTHS_OF_STAGES = (
    "hidden_sizes", "embed_dims", "encoder_hidden_sizes", "layer_dims", "neck_hidden_sizes"
)  # fmt: skip
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_XMOD = {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "xmod": _XMOD,
    "bamba": _MAMBA,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32},
    "granitemoehybrid": _MAMBA,
    "diffllama": {"attention_dropout": 0.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 8),
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
    },
    "swin": {
        "window_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "patch_size": 2,
    },
    "swinv2": {
        "window_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "patch_size": 2,
    },
    "donut-swin": {
        "window_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "patch_size": 2,
    },
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 4},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_groups": 4},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [1, 1], "patch_size": 2},
    "convnextv2": {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [1, 1], "patch_size": 2},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "granite_speech5_ctc": {"context_size": 4},
    "canine": {"num_hash_buckets": 16},
    "perceiver": {
        "d_latents": 16,
        "num_latents": 4,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "d_model": 16,
        "image_size": 16,
        "qk_channels": 8,
        "v_channels": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
    "segformer": {
        "hidden_sizes": [8, 8, 8, 8],
        "decoder_hidden_size": 8,
        "num_attention_heads": [1, 1, 1, 1],
        "depths": [1, 1, 1, 1],
        "image_size": 32,
    },
    "wav2vec2-bert": {"vocab_size": 64, "feature_projection_input_dim": 8},
    "wav2vec2-conformer": {"vocab_size": 64},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 8},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4, "input_size": 16, "patch_size": 8},
    "lilt": {"channel_shrink_ratio": 2, "max_2d_position_embeddings": 32},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "bbox_scale": 1.0},
    "neomme": {"head_dim": 16},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    "gemma3n": {"text_config": {"intermediate_size": 24, "activation_sparsity_pattern": 0.0}},
    "gemma3n_text": {"intermediate_size": 24, "activation_sparsity_pattern": 0.0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilevitv2": {"width_multiplier": 0.125},
    "siglip2": {"vision_config": {"num_patches": 4}},
    "beam": {"layer_types": ["full_attention", "full_attention"]},
    "moonshine": {
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "encoder_num_key_value_heads": 2,
        "decoder_num_key_value_heads": 2,
    },
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "hiera": {
        "embed_dim": 8,
        "num_heads": [1, 2],
        "depths": [1, 1],
        "image_size": [16, 16],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "query_stride": [2, 2],
        "num_query_pool": 1,
        "masked_unit_size": [2, 2],
        "decoder_depth": 1,
        "decoder_hidden_size": 8,
    },
}


def pairs() -> list[tuple[str, str]]:
    """Every (model type, head) that an auto class with labels knows."""
    return [
        (model_type, head)
        for head in HEADS
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
    ]


def model_class(model_type: str, head: str) -> type[nn.Module]:
    name = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")[model_type]
    if isinstance(name, (tuple, list)):
        name = name[0]
    found: type[nn.Module] = getattr(transformers, name)
    return found


def tiny_config(model_type: str, head: str) -> PretrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    answers = head in ("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING")
    settings = {**_shrunk(default), "num_labels": 2 if answers else LABELS}
    if getattr(default, "is_encoder_decoder", False):
        settings["decoder_start_token_id"] = 2
    return kind(**_merged(settings, OVERRIDES.get(model_type, {})))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    special = iter(range(VOCABULARY - 1, 0, -1))
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            settings[name] = {**_shrunk(value), "model_type": value.model_type}
        elif name in SHRUNK and _fits(name, value):
            settings[name] = _of_form(SHRUNK[name], value)
        elif name == "depths":
            settings[name] = type(value)([1] * len(value))
        elif name in _WIDTHS_OF_STAGES and isinstance(value, (list, tuple)):
            settings[name] = type(value)(8 * (i + 1) for i in range(len(value)))
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            settings[name] = next(special)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            settings[name] = _rotary(value)
        elif "dropout" in name and isinstance(value, float):
            settings[name] = 0.1
    return settings


def _fits(name: str, default: Any) -> bool:
    """Whether a field takes its value from `SHRUNK`: fields that follow from others are None."""
    if default is None:
        return name.endswith("token_id") or name in (
            "head_dim",
            "num_experts_per_tok",
            "vocab_size",
        )
    listed = isinstance(SHRUNK[name], tuple)
    return not listed or isinstance(default, (list, tuple))


def _of_form(wanted: Any, default: Any) -> Any:
    """A number where the default is one, a list of as many where it is a list."""
    if isinstance(default, (list, tuple)) and not isinstance(wanted, (list, tuple)):
        return type(default)([wanted] * len(default))
    return wanted


def _rotary(default: dict[str, Any]) -> dict[str, Any]:
    if all(isinstance(value, dict) for value in default.values()):  # one for each type of layer
        return {kind: _rotary(value) for kind, value in default.items()}
    return {**_ROTARY, **default, "mrope_section": [2, 1, 1]}


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in changes.items():
        inner = merged.get(name)
        both = isinstance(value, dict) and isinstance(inner, dict) and "rope" not in name
        merged[name] = _merged(inner, value) if both else value
    return merged


def build(model_type: str, head: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, its weights large enough to matter, and a batch with labels.

    Raises:
        Exception: whatever an architecture that cannot be made tiny in this way raises.
    """
    config, kind = tiny_config(model_type, head), model_class(model_type, head)
    if not isinstance(config, kind.config_class):  # that of a part, such as the text's
        config = next(c for c in vars(config).values() if isinstance(c, kind.config_class))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters are not tiny")
    torch.manual_seed(0)
    model = kind(config).eval()
    for module in model.modules():  # a cache of some kinds of layers cannot be made from nothing
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            module.config.use_cache = False
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, batch_for(model, head)


def batch_for(model: nn.Module, head: str) -> dict[str, Any]:
    """Padded inputs of uneven lengths, with labels for the head."""
    inputs = _inputs(model, head)
    return {**inputs, **_labels(model, head, inputs)}


def _accepts(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _inputs(model: nn.Module, head: str) -> dict[str, Any]:
    accepts = _accepts(model)
    main = model.main_input_name
    if head == "MULTIPLE_CHOICE":
        return {
            name: value.view(EXAMPLES, 2, *value.shape[1:])
            for name, value in _text(model, 2 * EXAMPLES).items()
        }
    if _is_language_model(model, head):
        return _text(model, EXAMPLES)
    if "input_features" in accepts:
        return _features(model)
    if "input_values" in accepts:
        return _waves(model)
    if main in ("pixel_values", "pixel_values_videos", "pixels") and "input_ids" not in accepts:
        return _pixels(model)
    if head in ("VISUAL_QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION"):
        return {**_text(model, EXAMPLES), **_pixels(model)}
    if head == "DOCUMENT_QUESTION_ANSWERING" and main == "pixel_values":
        return _pixels(model)
    return _text(model, EXAMPLES)


def _is_language_model(model: nn.Module, head: str) -> bool:
    """Text alone, though images or sounds may be given, too."""
    if "input_ids" not in _accepts(model) or model.config.is_encoder_decoder:
        return False
    return head in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


def _text(model: nn.Module, examples: int) -> dict[str, Any]:
    """input_ids that end with one end token each, and their mask."""
    generator = torch.Generator().manual_seed(2)
    width = 8
    lengths = torch.tensor([8, 5, 7, 6, 8, 4])[:examples]
    ids = torch.randint(4, VOCABULARY // 2, (examples, width), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    ids[torch.arange(examples), lengths - 1] = 2
    found = {"input_ids": ids, "attention_mask": mask}
    accepts = _accepts(model)
    if "bbox" in accepts:
        corners = torch.randint(0, 8, (examples, width, 2), generator=generator)
        found["bbox"] = torch.cat([corners, corners + 4], -1)
    if "visual_feats" in accepts:
        config = model.config
        found["visual_feats"] = torch.randn(
            examples, 3, config.visual_feat_dim, generator=generator
        )
        found["visual_pos"] = torch.rand(examples, 3, config.visual_pos_dim, generator=generator)
    return {name: value for name, value in found.items() if name in accepts or name == "input_ids"}


def _vision_config(model: nn.Module) -> Any:
    config = model.config
    for name in ("vision_config", "encoder", "backbone_config"):
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            return inner
    return config


def _pixels(model: nn.Module) -> dict[str, Any]:
    config = _vision_config(model)
    size = getattr(config, "image_size", None) or getattr(config, "img_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    shape = (EXAMPLES, channels, height, width)
    generator = torch.Generator().manual_seed(3)
    name = model.main_input_name if "pixel" in model.main_input_name else "pixel_values"
    if name == "pixel_values_videos" or type(model).__name__.endswith("VideoClassification"):
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 2)
        shape = (EXAMPLES, frames, *shape[1:])
    return {name: torch.randn(shape, generator=generator)}


def _waves(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    if hasattr(model.config, "num_mel_bins") and hasattr(model.config, "max_length"):
        shape = (EXAMPLES, model.config.max_length, model.config.num_mel_bins)
        return {"input_values": torch.randn(shape, generator=generator)}
    waves = torch.randn(EXAMPLES, 120, generator=generator)
    mask = torch.arange(120) < torch.tensor([120, 90, 105])[:, None]
    return {"input_values": waves * mask, "attention_mask": mask.long()}


def _features(model: nn.Module) -> dict[str, Any]:
    """Spectra, time last or first, as the architecture has it."""
    generator = torch.Generator().manual_seed(5)
    config = model.config
    inner = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None)
    inner = inner if isinstance(inner, PretrainedConfig) else config
    mels = getattr(inner, "num_mel_bins", None) or getattr(
        inner, "feature_projection_input_dim", None
    )
    mels = mels or getattr(inner, "input_feat_per_channel", 8)
    steps = 2 * getattr(inner, "max_source_positions", 16)
    time_last = any(key in model.config.model_type for key in ("whisper", "audio", "voxtral"))
    if time_last:
        return {"input_features": torch.randn(EXAMPLES, mels, steps, generator=generator)}
    mask = (torch.arange(steps) < torch.tensor([1.0, 0.75, 0.875])[:, None] * steps).long()
    features = torch.randn(EXAMPLES, steps, mels, generator=generator) * mask[..., None]
    found = {"input_features": features}
    return {**found, "attention_mask": mask} if "attention_mask" in _accepts(model) else found


def _labels(model: nn.Module, head: str, inputs: dict[str, Any]) -> dict[str, Any]:
    classes = torch.arange(EXAMPLES) % LABELS
    if head == "QUESTION_ANSWERING" or head == "DOCUMENT_QUESTION_ANSWERING":
        if "start_positions" in _accepts(model):
            ends = {"start_positions": classes, "end_positions": classes + 1}
            extra = {"is_impossible", "cls_index"} & _accepts(model)
            return {**ends, **{name: torch.zeros(EXAMPLES).long() for name in extra}}
        if head == "QUESTION_ANSWERING":
            return {"labels": classes}
    if head in ("MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"):
        return {"labels": classes % 2}
    if head in (
        "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
        "AUDIO_CLASSIFICATION", "AUDIO_XVECTOR",
    ):  # fmt: skip
        return {"labels": classes}
    if head == "ZERO_SHOT_IMAGE_CLASSIFICATION":
        return {"return_loss": True}
    if head == "VISUAL_QUESTION_ANSWERING" and "labels" in _accepts(model):
        return {"labels": nn.functional.one_hot(classes, _num_labels(model)).float()}
    if head == "SEMANTIC_SEGMENTATION":
        size = next(iter(inputs.values())).shape[-2:]
        labels = torch.arange(EXAMPLES * size[0] * size[1]).view(EXAMPLES, *size) % LABELS
        labels[:, 0] = 255
        return {"labels": labels}
    if head == "AUDIO_FRAME_CLASSIFICATION":
        with torch.no_grad():
            frames = model(**inputs).logits.shape[1]
        labels = torch.arange(EXAMPLES * frames).view(EXAMPLES, frames) % LABELS
        return {"labels": nn.functional.one_hot(labels, LABELS)}
    if head == "CTC":
        return {"labels": torch.tensor([[4, 5, 6], [7, 7, -100], [8, -100, -100]])}
    if head == "TOKEN_CLASSIFICATION":
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        labels = ids % LABELS
        return {"labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}
    written = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "DOCUMENT_QUESTION_ANSWERING")
    if head in written and not _is_language_model(model, head):
        return {"labels": torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100], [5, 9, 6, 2]])}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    labels = labels.masked_fill(labels > VOCABULARY // 2, -100)
    return {"labels": labels}


def _num_labels(model: nn.Module) -> int:
    return int(model.config.num_labels)
