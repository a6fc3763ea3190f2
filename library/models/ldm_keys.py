"""Names of weights in single-file checkpoints and in diffusers and transformers modules, both ways.

Every function is pure: a dict of tensors in, a dict of tensors out, names changed and, in the few places where the
layouts differ in more than names, views of the same data (a fused projection split, a 1x1 convolution as a matrix).
How many levels and layers there are is read from the names themselves, so narrow, short and inpainting models pass as
well. A name that is not understood is kept as it is: whoever loads the result reports it.

The single-file layout is that of latent diffusion (Rombach et al. 2022), whose text encoder is CLIP in transformers'
layout for SD1 and in OpenCLIP's layout for SD2. Names here are those inside a part, without the prefixes below.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

UNET_PREFIX: Final = "model.diffusion_model."
VAE_PREFIX: Final = "first_stage_model."
SD1_TEXT_PREFIX: Final = "cond_stage_model.transformer."
SD2_TEXT_PREFIX: Final = "cond_stage_model.model."
SD2_TEXT_LAYERS: Final = 23
"""SD2 reads the last but one of OpenCLIP ViT-H's 24 layers, so the modules have 23."""

# Below a residual block, LDM name -> diffusers name.
_UNET_RESNET: Final = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET: Final = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION: Final = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# The names that diffusers gave the VAE's attention before 0.17; folders of that time are still about.
_OLD_VAE_ATTENTION: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Below a layer of the text encoder, OpenCLIP name -> transformers name.
_TEXT_LAYER: Final = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TEXT_TOP: Final = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_RESBLOCK: Final = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_LAYER: Final = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def unet_from_ldm(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """A checkpoint's U-Net under diffusers' names; shapes are the same."""
    paths = _unet_paths(*_unet_layout_of_ldm(tensors))
    return {_renamed(name, paths): tensor for name, tensor in tensors.items()}


def unet_to_ldm(tensors: "Mapping[str, Tensor]", *, linear_projection: bool) -> "dict[str, Tensor]":
    """A diffusers U-Net under the checkpoint's names.

    Args:
        tensors: The U-Net's state dict.
        linear_projection: Whether the transformers' ``proj_in`` and ``proj_out`` are written as matrices (SD2) or as
            1x1 convolutions (SD1), whichever the module has.
    """
    paths = _inverted(_unet_paths(*_unet_layout_of_diffusers(tensors)))
    projection = re.compile(r"\.proj_(in|out)\.weight$")
    dimensions = 2 if linear_projection else 4
    return {
        _renamed(name, paths): _with_dimensions(tensor, dimensions) if projection.search(name) else tensor
        for name, tensor in tensors.items()
    }


def vae_from_ldm(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """A checkpoint's VAE under diffusers' names, its attention's 1x1 convolutions as matrices."""
    paths = _vae_paths(_count(tensors, r"encoder\.down\.(\d+)\."), _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."))
    renamed = {_renamed(name, paths): tensor for name, tensor in tensors.items()}
    return _vae_attention_as(renamed, 2)


def vae_to_ldm(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """A diffusers VAE under the checkpoint's names, its attention's matrices as 1x1 convolutions."""
    levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    layers = _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    paths = _inverted(_vae_paths(levels, layers))
    return {_renamed(name, paths): tensor for name, tensor in _vae_attention_as(tensors, 4).items()}


def vae_from_folder(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The VAE of a diffusers folder of any age, under today's names."""
    old = re.compile(r"(.*\.mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")
    renamed = {}
    for name, tensor in tensors.items():
        found = old.fullmatch(name)
        renamed[found[1] + _OLD_VAE_ATTENTION[found[2]] + found[3] if found else name] = tensor
    return _vae_attention_as(renamed, 2)


def text_from_sd1(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """CLIP in transformers' layout of any age, with or without ``text_model.``, as today's flat text encoder names it.

    ``position_ids`` (a constant) and a text projection (which Stable Diffusion doesn't use) are left out.
    """
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {n: t for n, t in flat.items() if n not in ("embeddings.position_ids", "text_projection.weight")}


def text_to_sd1(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """A text encoder's state dict with the ``text_model.`` before every name that checkpoints and folders have."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def text_from_sd2(tensors: "Mapping[str, Tensor]", *, layers: int) -> "dict[str, Tensor]":
    """OpenCLIP's text encoder under transformers' names, as far as Stable Diffusion 2 uses it.

    Args:
        tensors: The text encoder in OpenCLIP's layout.
        layers: How many layers to keep, counted from the first; see :func:`sd2_text_layers`.
    """
    result = {_TEXT_TOP[name]: tensor for name, tensor in tensors.items() if name in _TEXT_TOP}
    for name, tensor in tensors.items():
        found = _RESBLOCK.fullmatch(name)
        if found and int(found[1]) < layers:
            result |= _text_layer_from_sd2(f"encoder.layers.{found[1]}.", found[2], tensor)
    return result


def text_to_sd2(tensors: "Mapping[str, Tensor]", *, stand_ins: bool = True) -> "dict[str, Tensor]":
    """A text encoder in OpenCLIP's layout.

    Args:
        tensors: The text encoder's state dict.
        stand_ins: Add what the layout has and Stable Diffusion doesn't use. The layer after the last is a copy of the
            last, the text projection is all ones and the logit scale is 1: what existing programs write when there is
            no original to take them from.
    """
    top = {new: old for old, new in _TEXT_TOP.items()}
    result = {top[name]: tensor for name, tensor in tensors.items() if name in top}
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        if found:
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        elif name not in top:
            result[name] = tensor
    for number, layer in layers.items():
        result |= _text_layer_to_sd2(number, layer)
    return result | _stand_ins(layers, tensors["final_layer_norm.weight"]) if stand_ins else result


def _stand_ins(layers: "Mapping[int, Mapping[str, Tensor]]", like: "Tensor") -> "dict[str, Tensor]":
    import torch

    last = max(layers)
    result = {name: tensor.clone() for name, tensor in _text_layer_to_sd2(last + 1, layers[last]).items()}
    result["text_projection"] = torch.ones(len(like), len(like), dtype=like.dtype, device=like.device)
    result["logit_scale"] = torch.tensor(1, device=like.device)
    return result


def sd2_text_layers(names: Iterable[str]) -> int:
    """How many OpenCLIP layers of a checkpoint Stable Diffusion 2 uses: all but the last, which some files lack."""
    count = _count(names, r"transformer\.resblocks\.(\d+)\.")
    return count if count == SD2_TEXT_LAYERS else max(count - 1, 0)


def _text_layer_from_sd2(prefix: str, name: str, tensor: "Tensor") -> "dict[str, Tensor]":
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}.{kind}": piece for part, piece in parts}
    return {prefix + _with_head(name, _TEXT_LAYER): tensor}


def _text_layer_to_sd2(number: int, layer: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    import torch

    prefix = f"transformer.resblocks.{number}."
    result = {}
    for kind in ("weight", "bias"):
        parts = [layer[f"self_attn.{part}.{kind}"] for part in ("q_proj", "k_proj", "v_proj")]
        result[f"{prefix}attn.in_proj_{kind}"] = torch.cat(parts)
    names = {new: old for old, new in _TEXT_LAYER.items()}
    fused = re.compile(r"self_attn\.[qkv]_proj\.")
    return result | {prefix + _with_head(n, names): tensor for n, tensor in layer.items() if not fused.match(n)}


def _unet_layout_of_ldm(names: Iterable[str]) -> tuple[list[int], list[bool]]:
    """Residual blocks of each level on the way down, and whether each level on the way up has attention."""
    known = set(names)
    layers = [0]
    for number in range(1, _count(known, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{number}.0.op.weight" in known:
            layers.append(0)
        else:
            layers[-1] += 1
    attention, number = [], 0
    for count in reversed(layers):
        attention.append(f"output_blocks.{number}.1.norm.weight" in known)
        number += count + 1
    return layers, attention


def _unet_layout_of_diffusers(names: Iterable[str]) -> tuple[list[int], list[bool]]:
    known = set(names)
    levels = range(_count(known, r"down_blocks\.(\d+)\."))
    layers = [_count(known, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in levels]
    return layers, [f"up_blocks.{level}.attentions.0.norm.weight" in known for level in levels]


def _unet_paths(layers: Sequence[int], up_attention: Sequence[bool]) -> dict[str, str]:
    """LDM path -> diffusers path of everything in the U-Net whose inside is named alike."""
    paths = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    _add_resnet(paths, "middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    _add_resnet(paths, "middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
    block = 1
    for level, count in enumerate(layers):
        for layer in range(count):
            _add_resnet(paths, f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            paths[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
            block += 1
        if level < len(layers) - 1:
            paths[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, (count, attention) in enumerate(zip(reversed(layers), up_attention, strict=True)):
        for layer in range(count + 1):
            _add_resnet(paths, f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            if attention:
                paths[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
            block += 1
        # The upsampler follows the attention of the level's last block, or takes its place.
        paths[f"output_blocks.{block - 1}.{2 if attention else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return paths


def _vae_paths(levels: int, layers: int) -> dict[str, str]:
    """LDM path -> diffusers path for the VAE, whose decoder's levels are counted from opposite ends."""
    paths = {}
    for half, ldm_level, folder_level, extra in (
        ("encoder", "down", "down_blocks", ("downsample", "downsamplers")),
        ("decoder", "up", "up_blocks", ("upsample", "upsamplers")),
    ):
        paths[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for number, place in ((1, 0), (2, 1)):
            _add_resnet(paths, f"{half}.mid.block_{number}", f"{half}.mid_block.resnets.{place}", _VAE_RESNET)
        for old, new in _VAE_ATTENTION.items():
            paths[f"{half}.mid.attn_1.{old}"] = f"{half}.mid_block.attentions.0.{new}"
        for level in range(levels):
            ldm = f"{half}.{ldm_level}.{level}"
            own = f"{half}.{folder_level}.{level if half == 'encoder' else levels - 1 - level}"
            for layer in range(layers + (half == "decoder")):
                _add_resnet(paths, f"{ldm}.block.{layer}", f"{own}.resnets.{layer}", _VAE_RESNET)
            paths[f"{ldm}.{extra[0]}.conv"] = f"{own}.{extra[1]}.0.conv"
    return paths


def _add_resnet(paths: dict[str, str], ldm: str, own: str, inside: Mapping[str, str]) -> None:
    paths[ldm] = own
    paths |= {f"{ldm}.{old}": f"{own}.{new}" for old, new in inside.items()}


def _vae_attention_as(tensors: "Mapping[str, Tensor]", dimensions: int) -> "dict[str, Tensor]":
    matrix = re.compile(r".*\.mid_block\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")
    return {n: _with_dimensions(t, dimensions) if matrix.fullmatch(n) else t for n, t in tensors.items()}


def _with_dimensions(tensor: "Tensor", dimensions: int) -> "Tensor":
    """``(out, in)`` seen as ``(out, in, 1, 1)`` or the reverse; other tensors as they are."""
    if tensor.ndim == dimensions or tuple(tensor.shape[2:]) not in ((), (1, 1)):
        return tensor
    return tensor.reshape(*tensor.shape[:2], *(1,) * (dimensions - 2))


def _inverted(paths: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in paths.items()}


def _renamed(name: str, paths: Mapping[str, str]) -> str:
    """``name`` with its longest known beginning (whole components) exchanged."""
    head, tail = name, ""
    while head:
        if head in paths:
            return paths[head] + tail
        head, dot, last = head.rpartition(".")
        tail = dot + last + tail
    return name


def _with_head(name: str, heads: Mapping[str, str]) -> str:
    head, _, kind = name.rpartition(".")
    return f"{heads.get(head, head)}.{kind}" if head else name


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that ``pattern`` finds at the start of a name; 0 without any."""
    matcher = re.compile(pattern)
    return max((int(found[1]) + 1 for found in map(matcher.match, names) if found), default=0)
