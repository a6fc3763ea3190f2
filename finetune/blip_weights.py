"""BLIP's own checkpoint files (``.pth``) as weights and structure of the transformers model.

Both hold the same tensors under different names; the structure is read from their shapes, and what shapes cannot tell
(the width of a head, layer norms) is the same in every BLIP model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.errors import UserError
from library.files import read_tensors

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_WIDTH: Final = 64
_VISION_NORM_EPSILON: Final = 1e-6
_NEW_TOKENS: Final = 2
"""BLIP adds two tokens to BERT's vocabulary: the one that begins a caption, and the encoder's."""

_VISION: Final = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_VISION_BLOCK: Final = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_DECODER: Final = "text_decoder.cls.predictions.decoder"


def transformers_name(name: str) -> str | None:
    """The name in transformers of a tensor of BLIP's captioning model; None for one that captioning does not use."""
    if name.startswith("text_decoder.") and not name.endswith("position_ids"):
        return name
    part = name.removeprefix("visual_encoder.")
    if part == name:
        return None
    if block := _BLOCK.fullmatch(part):
        number, layer, kind = block.groups()
        return f"vision_model.encoder.layers.{number}.{_VISION_BLOCK[layer]}.{kind}" if layer in _VISION_BLOCK else None
    for old, new in _VISION.items():
        if part.startswith(old):
            return f"vision_model.{new}{part[len(old) :]}"
    return None


def read_weights(path: Path) -> "dict[str, Tensor]":
    """The tensors of a BLIP checkpoint under the names of transformers.

    Raises:
        UserError: The file cannot be read, holds more than tensors, or is no BLIP captioning model.
    """
    file = read_tensors(path, mapped=True)
    nested = file.extra.get("model")
    source: Mapping[str, Any] = nested if isinstance(nested, dict) else file.tensors
    weights = {new: tensor for name, tensor in source.items() if (new := transformers_name(name)) is not None}
    if not {"vision_model.embeddings.patch_embedding.weight", "text_decoder.cls.predictions.bias"} <= weights.keys():
        raise UserError(
            "no BLIP captioning model: it has no image encoder with a text decoder",
            where=str(path),
            remedy="Give BLIP's model_large_caption.pth or model_base_caption_capfilt_large.pth, or a hub id.",
        )
    # Tied weights may be stored once.
    weights.setdefault(f"{_DECODER}.weight", weights["text_decoder.bert.embeddings.word_embeddings.weight"])
    weights.setdefault(f"{_DECODER}.bias", weights["text_decoder.cls.predictions.bias"])
    return weights


def structure_of(weights: "Mapping[str, Tensor]", *, sep_token_id: int) -> dict[str, Any]:
    """The configuration (keyword arguments of ``BlipConfig``) of the model with these ``weights``."""
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    positions = weights["vision_model.embeddings.position_embedding"].shape[1]
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    vision_layer, text_layer = "vision_model.encoder.layers", "text_decoder.bert.encoder.layer"
    width, patch = patches.shape[0], patches.shape[-1]
    vision = {
        "hidden_size": width,
        "intermediate_size": weights[f"{vision_layer}.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(weights, vision_layer),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "layer_norm_eps": _VISION_NORM_EPSILON,
    }
    text = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": width,
        "intermediate_size": weights[f"{text_layer}.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _layers(weights, text_layer),
        "num_attention_heads": max(words.shape[1] // _HEAD_WIDTH, 1),
        "max_position_embeddings": weights["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "bos_token_id": words.shape[0] - _NEW_TOKENS,
        "eos_token_id": sep_token_id,
        "sep_token_id": sep_token_id,
        "pad_token_id": 0,
    }
    return {"vision_config": vision, "text_config": text}


def words_of_vocabulary(weights: "Mapping[str, Tensor]") -> int:
    """How many words BERT's vocabulary must have for these ``weights``."""
    return int(weights["text_decoder.bert.embeddings.word_embeddings.weight"].shape[0]) - _NEW_TOKENS


def _layers(weights: "Mapping[str, Tensor]", prefix: str) -> int:
    numbers = {int(name[len(prefix) + 1 :].split(".")[0]) for name in weights if name.startswith(f"{prefix}.")}
    return len(numbers)
