"""The structure of a model's parts: configurations read from the shapes of weights, and carried by files that need it.

Shapes tell almost everything: levels, layers, channels, which levels have attention, text width. What they cannot tell
is the same in every Stable Diffusion of a family: 8 attention heads (SD1) or heads 64 wide (SD2), 32 groups a
normalisation, text heads 64 wide. A model built otherwise loads from its ``config.json`` files, or from a single file
that carries its configuration, as those written here do (:func:`stated_structure`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from library.documents import parse_json
from library.errors import UserError
from library.models.detect import PARTS
from library.models.variant import Family

Config = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]

CONFIG_KEY: Final = "diffusers_config"
"""Where a single file keeps its configuration: safetensors metadata, or beside ``state_dict`` in a torch file."""

HEAD_WIDTH: Final = 64
NORM_GROUPS: Final = 32
_CONFIGS: Final = Path(__file__).with_name("configs")
# Fields that change no weight and no output; a difference in them is no reason to carry a configuration.
_INDIFFERENT: Final = {"sample_size", "upcast_attention", "architectures", "projection_dim", "model_type"} | {
    f"{kind}_token_id" for kind in ("bos", "eos", "pad")
}


def shipped_config(name: str) -> Config:
    """A full-size configuration that comes with the program.

    Args:
        name: ``unet_sd1``, ``unet_sd2``, ``vae``, ``text_encoder_sd1``, ``text_encoder_sd2`` or ``scheduler``.
    """
    config: Config = json.loads((_CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def unet_config(shapes: Shapes, family: Family, *, where: str) -> Config:
    """The U-Net's configuration, from its weights' shapes under diffusers' names.

    Raises:
        UserError: The weights are not those of a U-Net, or of one with other heads or groups than SD's.
    """
    levels = _numbered(shapes, "down_blocks.{}.resnets.0.conv2.weight")
    if not levels or "conv_in.weight" not in shapes or "conv_out.weight" not in shapes:
        raise _unreadable("U-Net", where)
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)]
    layers = [_numbered(shapes, f"down_blocks.{level}.resnets.{{}}.conv2.weight") for level in range(levels)]
    attention = [f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in range(levels)]
    projections = [shape for name, shape in shapes.items() if name.endswith("attentions.0.proj_in.weight")]
    contexts = [shape for name, shape in shapes.items() if name.endswith("transformer_blocks.0.attn2.to_k.weight")]
    if not projections or not contexts:
        raise _unreadable("U-Net", where)
    config = shipped_config(f"unet_{family}") | {
        "block_out_channels": channels,
        "cross_attention_dim": contexts[0][1],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "in_channels": shapes["conv_in.weight"][1],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "out_channels": shapes["conv_out.weight"][0],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "use_linear_projection": len(projections[0]) == 2,
    }
    if "mid_block.resnets.0.conv1.weight" not in shapes:
        config["mid_block_type"] = None
    if family == "sd2":
        _divides(HEAD_WIDTH, channels, "attention head width", where)
        config["attention_head_dim"] = [channel // HEAD_WIDTH for channel in channels]
    _divides(NORM_GROUPS, channels, "number of groups a normalisation", where)
    return config


def vae_config(shapes: Shapes, *, where: str) -> Config:
    """The VAE's configuration, from its weights' shapes under diffusers' names.

    Raises:
        UserError: The weights are not those of a VAE, or of one with other groups than SD's.
    """
    levels = _numbered(shapes, "encoder.down_blocks.{}.resnets.0.conv2.weight")
    if not levels or "decoder.conv_in.weight" not in shapes or "encoder.conv_in.weight" not in shapes:
        raise _unreadable("VAE", where)
    channels = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)]
    _divides(NORM_GROUPS, channels, "number of groups a normalisation", where)
    return shipped_config("vae") | {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": _numbered(shapes, "encoder.down_blocks.0.resnets.{}.conv2.weight"),
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder_config(shapes: Shapes, family: Family, *, where: str) -> Config:
    """The text encoder's configuration, from its weights' shapes under transformers' (flat) names.

    Raises:
        UserError: The weights are not those of a CLIP text encoder, or of one with other heads than CLIP's.
    """
    layers = _numbered(shapes, "encoder.layers.{}.mlp.fc1.weight")
    if not layers or "embeddings.token_embedding.weight" not in shapes:
        raise _unreadable("text encoder", where)
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    _divides(HEAD_WIDTH, [width], "text head width", where)
    return shipped_config(f"text_encoder_{family}") | {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "num_attention_heads": width // HEAD_WIDTH,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


def carried_structure(metadata: Mapping[str, Any], *, where: str) -> dict[str, Config]:
    """The configurations that a single file carries, by part; none of most files.

    Args:
        metadata: The file's metadata, or what a torch file has beside its weights.
        where: The file, for the error.

    Raises:
        UserError: The entry is there but no table of configurations, or does not tell the text encoder's layers.
    """
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    try:
        carried = dict(parse_json(text))
        found = {part: dict(carried[part]) for part in PARTS if part in carried}
        # What is read of it before the part is built; an empty one is read from shapes.
        layers = text_encoder.get("num_hidden_layers") if (text_encoder := found.get("text_encoder")) else 0
        if type(layers) is not int:
            raise ValueError(f"num_hidden_layers of the text encoder is {layers!r}, not a whole number")
        return found
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the file's own configuration ({CONFIG_KEY}) is not readable: {error}",
            where=where,
            remedy="Save the model again with the program that made it, or use a Diffusers folder.",
        ) from error


def stated_structure(actual: Mapping[str, Config], shapes: Mapping[str, Shapes], family: Family) -> str | None:
    """What a single file has to carry so that it loads again: nothing where its shapes say all.

    Args:
        actual: Configuration of each part.
        shapes: Shapes of each part's weights, under diffusers' and transformers' names.
        family: SD1 or SD2.

    Returns:
        The text for :data:`CONFIG_KEY`, or None when :func:`unet_config` and its like give the same structure.
    """
    try:
        read = {
            "unet": unet_config(shapes["unet"], family, where=""),
            "vae": vae_config(shapes["vae"], where=""),
            "text_encoder": text_encoder_config(shapes["text_encoder"], family, where=""),
        }
    except UserError:
        read = {}
    known = {part: json.loads(json.dumps({k: v for k, v in actual[part].items() if k[0] != "_"})) for part in PARTS}
    if read and all(_agree(known[part], read[part]) for part in PARTS):
        return None
    return json.dumps(known, separators=(",", ":"), sort_keys=True)


def _agree(actual: Config, read: Config) -> bool:
    fields = (field for field in read if field[0] != "_" and field not in _INDIFFERENT)
    return all(actual.get(field) == read[field] for field in fields)


def _numbered(shapes: Shapes, pattern: str) -> int:
    """How many names there are when ``{}`` in ``pattern`` counts from 0."""
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count


def _divides(divisor: int, channels: Sequence[int], what: str, where: str) -> None:
    odd = [channel for channel in channels if channel % divisor]
    if odd:
        raise UserError(
            f"the model's structure cannot be read from this file: {odd[0]} channels do not fit the usual {what} "
            f"({divisor}), and the file carries no configuration",
            where=where,
            remedy="Use the model's Diffusers folder, whose config.json files say how it is built.",
        )


def _unreadable(part: str, where: str) -> UserError:
    return UserError(
        f"the weights of a Stable Diffusion {part} were expected, and these are not",
        where=where,
        remedy="Give a Stable Diffusion 1.x or 2.x model.",
    )
