"""Tiny models of every architecture of `transformers`, and a batch for each head."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from coverage_configs import LABELS, VOCABULARY, tiny_config
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

HEADS = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "CAUSAL_LM",
    "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "CTC",
    "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING",
    "DOCUMENT_QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION",
)  # fmt: skip
EXAMPLES = 3
_SEES = ("git", "blip")  # these take no text without an image
MAX_PARAMETERS = 9_000_000


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


def build(model_type: str, head: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, its weights large enough to matter, and a batch with labels.

    Raises:
        Exception: whatever an architecture that cannot be made tiny in this way raises.
    """
    config, kind = tiny_config(model_type, head), model_class(model_type, head)
    if not isinstance(config, kind.config_class):  # that of a part, such as the text's
        parts = vars(config).values()
        config = next((part for part in parts if isinstance(part, kind.config_class)), config)
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
        pixels = _pixels(model) if model.config.model_type in _SEES else {}
        return {**_text(model, EXAMPLES), **pixels}
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
    if "global_attention_mask" in accepts:
        found["global_attention_mask"] = (torch.arange(width) == 0).long().expand(examples, -1)
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
