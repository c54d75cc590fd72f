"""Configurations of every architecture of `transformers`, as small as they come.

Each is shrunk by the names of its fields, sub-configurations included; `OVERRIDES` holds what
single architectures need beyond that.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 64
LABELS = 3

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
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
_WINDOWS = {
    "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 2,
}  # fmt: skip
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
_FOUR_LAYERS = {
    "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": False,
    "image_size": 32,
}  # fmt: skip
_BY_LAYER = {"full_attention": _ROTARY, "sliding_attention": _ROTARY}
_SCALED = {
    **_ROTARY, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
_HYBRID = {
    "layer_types": ["mamba", "hybrid"], "attention_hidden_size": 32, "attention_head_dim": 16,
    "use_mamba_kernels": False,
}  # fmt: skip
_DPT = {
    "num_hidden_layers": 4, "backbone_out_indices": [1, 2, 3, 4], "use_auxiliary_head": False,
    "image_size": 32, "neck_hidden_sizes": [8, 8, 8, 8],
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "beam": {"layer_types": ["full_attention", "full_attention"]},
    "beit": _FOUR_LAYERS,
    "bit": {**_STAGES, "num_groups": 4},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "bbox_scale": 1.0},
    "canine": {"num_hash_buckets": 16},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass": {"text_config": {"rope_parameters": _BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [1, 1], "patch_size": 2},
    "convnextv2": {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [1, 1], "patch_size": 2},
    "data2vec-vision": _FOUR_LAYERS,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "diffllama": {"attention_dropout": 0.0},
    "donut-swin": _WINDOWS,
    "dpt": _DPT,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 64},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32},
    "gemma3n_text": {
        "intermediate_size": [24, 24], "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 4,
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {
        **_ROTARY, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5,
    }}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 4}},
    "granitemoehybrid": _MAMBA,
    "hiera": {
        "embed_dim": 8, "num_heads": [1, 2], "depths": [1, 1], "image_size": [16, 16],
        "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
        "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [2, 2],
        "decoder_depth": 1, "decoder_hidden_size": 8,
    },
    "kimi_linear": {"num_experts_per_token": 2},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4, "input_size": 16, "patch_size": 8},
    "levit": {"hidden_sizes": [16, 16, 16], "key_dim": [8, 8, 8], "image_size": 64},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    "lilt": {"hidden_size": 24, "max_2d_position_embeddings": 32},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1},
    "mimo_v2_flash": {"rope_parameters": _BY_LAYER},
    "mistral4": {"rope_parameters": _SCALED},
    "mobilebert": {"embedding_size": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilevitv2": {"width_multiplier": 0.125, "image_size": 64},
    "moonshine": {
        f"{side}_{what}": 2 for side in ("encoder", "decoder")
        for what in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    },
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "d_latents": 16, "num_latents": 4, "num_blocks": 1, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "d_model": 16,
        "qk_channels": 8, "v_channels": 16,
    },
    "pvt": {"image_size": 32},
    "pvt_v2": {"image_size": [32, 32]},
    "reformer": {
        "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 8), "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4, "attn_layers": ["local", "lsh"], "num_buckets": 2,
    },
    "reformer/CAUSAL_LM": {"is_decoder": True},
    "regnet": {**_STAGES, "groups_width": 4},
    "resnet": {**_STAGES, "layer_type": "basic"},
    "roc_bert": {
        "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "segformer": {
        "hidden_sizes": [8, 8, 8, 8], "decoder_hidden_size": 8,
        "num_attention_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1], "image_size": 32,
    },
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 8], "image_size": [64, 64]},
    "tipsv2_dpt": _DPT,
    "upernet": {
        "use_auxiliary_head": False, "hidden_size": 16, "pool_scales": [1, 2], "backbone_config": {
            "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1], "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    },
    "vjepa2": {
        "crop_size": 16, "frames_per_clip": 2, "pred_hidden_size": 16,
        "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
    },
    "wav2vec2-bert": {"vocab_size": VOCABULARY, "feature_projection_input_dim": 8},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "zamba": {**_HYBRID, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    "zamba2": {
        **_HYBRID, "n_mamba_heads": 8, "mamba_headdim": 4, "hybrid_layer_ids": [1],
        "adapter_rank": 4, "num_query_groups": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str, head: str) -> PretrainedConfig:
    """A configuration of every part of the architecture at its smallest."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    answers = head in ("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING")
    settings = {**_shrunk(default), "num_labels": 2 if answers else LABELS}
    if getattr(default, "is_encoder_decoder", False):
        settings["decoder_start_token_id"] = 2
    for key in (model_type, f"{model_type}/{head}"):
        settings = _merged(settings, OVERRIDES.get(key, {}))
    return kind(**settings)


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
    if default and all(isinstance(v, dict) for v in default.values()):  # for each type of layer
        return {kind: _rotary(value) for kind, value in default.items()}
    return {**_ROTARY, **default, "mrope_section": [2, 1, 1]}


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in changes.items():
        inner = merged.get(name)
        both = isinstance(value, dict) and isinstance(inner, dict) and "rope" not in name
        merged[name] = _merged(inner, value) if both else value
    return merged
