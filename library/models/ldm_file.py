"""Single-file checkpoints: take one apart into the weights of its parts, and put one together."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from library.errors import UserError
from library.files import TensorFile, write_tensors
from library.models import ldm_keys
from library.models.detect import read_config
from library.models.recognise import check_vae
from library.models.structure import (
    CONFIG_KEY,
    Config,
    carried_structure,
    stated_structure,
    text_encoder_config,
    unet_config,
    vae_config,
)
from library.models.variant import Family

_VAE_HALVES: Final = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True, slots=True)
class PartWeights:
    """One part of a model: its configuration, and its weights under the module's own names."""

    config: Config
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far training has come, as torch checkpoints say it: finished optimizer steps and epochs."""

    step: int
    epoch: int


def split_checkpoint(file: TensorFile, family: Family, *, where: str) -> dict[str, PartWeights]:
    """The parts ``unet``, ``vae`` and ``text_encoder`` of a checkpoint; the rest (EMA copies, say) is left.

    Raises:
        UserError: A part is missing or not Stable Diffusion's.
    """
    carried = carried_structure({**file.metadata, **file.extra}, where=where)
    unet = ldm_keys.unet_from_ldm(_below(file.tensors, ldm_keys.UNET_PREFIX))
    return {
        "unet": PartWeights(carried.get("unet") or unet_config(_shapes(unet), family, where=where), unet),
        "vae": vae_of_checkpoint(file, where=where),
        "text_encoder": _text_encoder(file.tensors, family, carried.get("text_encoder"), where),
    }


def vae_of_checkpoint(file: TensorFile, *, where: str, beside: Path | None = None) -> PartWeights:
    """The VAE of a whole checkpoint, or of a file that holds a VAE alone, in the checkpoint's layout or in diffusers'.

    Args:
        file: What was read.
        where: The file, for errors.
        beside: A ``config.json`` to go by if the file has diffusers' layout and the configuration exists.

    Raises:
        UserError: There is no VAE in the file.
    """
    check_vae(file.tensors, where=where)
    tensors = _below(file.tensors, ldm_keys.VAE_PREFIX) or file.tensors
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith(_VAE_HALVES)}
    config = carried_structure({**file.metadata, **file.extra}, where=where).get("vae")
    if any(name.startswith("encoder.down_blocks.") for name in vae):
        vae = ldm_keys.vae_from_folder(vae)
        if beside and beside.is_file():
            config = read_config(beside)
    else:
        vae = ldm_keys.vae_from_ldm(vae)
    return PartWeights(config or vae_config(_shapes(vae), where=where), vae)


def ldm_state(*, text_encoder: Any, vae: Any, unet: Any, v2: bool, stand_ins: bool = True) -> dict[str, Tensor]:
    """The weights of a whole model under a checkpoint's names.

    SD1 has the 1130 names of its kind; SD2 has 1214, and 1228 with ``stand_ins`` for what Stable Diffusion doesn't use
    (:func:`library.models.ldm_keys.text_to_sd2`), as no earlier checkpoint is there to take them from.
    """
    text = text_encoder.state_dict()
    parts = (
        (ldm_keys.UNET_PREFIX, ldm_keys.unet_to_ldm(unet.state_dict(), linear_projection=v2)),
        (ldm_keys.VAE_PREFIX, ldm_keys.vae_to_ldm(vae.state_dict())),
        (
            ldm_keys.SD2_TEXT_PREFIX if v2 else ldm_keys.SD1_TEXT_PREFIX,
            ldm_keys.text_to_sd2(text, stand_ins=stand_ins) if v2 else ldm_keys.text_to_sd1(text),
        ),
    )
    return {prefix + name: tensor for prefix, tensors in parts for name, tensor in tensors.items()}


def ldm_structure(*, text_encoder: Any, vae: Any, unet: Any, v2: bool) -> dict[str, str]:
    """The metadata entry that a single file of this model needs beside its weights; empty for the usual structure."""
    configs = {"unet": dict(unet.config), "vae": dict(vae.config), "text_encoder": text_encoder.config.to_dict()}
    modules = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    shapes = {part: _shapes(module.state_dict()) for part, module in modules.items()}
    stated = stated_structure(configs, shapes, "sd2" if v2 else "sd1")
    return {CONFIG_KEY: stated} if stated else {}


def carried_over(source: TensorFile, written: Container[str]) -> dict[str, Tensor]:
    """What of a source checkpoint goes unchanged into a file made from it: all but the weights of the three parts.

    Args:
        source: The checkpoint that the model came from.
        written: The names that the new file has already.
    """
    parts = (ldm_keys.UNET_PREFIX, *(ldm_keys.VAE_PREFIX + half for half in _VAE_HALVES))

    def is_replaced(name: str) -> bool:
        # Some files of SD1 lack this piece of the text encoder's names.
        usual = f"{ldm_keys.SD1_TEXT_PREFIX}text_model.{name.removeprefix(ldm_keys.SD1_TEXT_PREFIX)}"
        return name in written or name.startswith(parts) or usual in written

    return {name: tensor for name, tensor in source.tensors.items() if not is_replaced(name)}


def write_ldm(
    path: Path,
    *,
    text_encoder: Any,
    vae: Any,
    unet: Any,
    v2: bool,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    source: TensorFile | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a whole model as one file; the suffix chooses the format, ``.safetensors`` or a torch file.

    Args:
        path: Final name.
        text_encoder: The text encoder, a ``CLIPTextModel``.
        vae: The VAE, an ``AutoencoderKL``.
        unet: The U-Net, a ``UNet2DConditionModel``.
        v2: Whether the model is an SD2, whose file has OpenCLIP's layout.
        dtype: Cast the weights to it; as they are when absent.
        metadata: Text for the safetensors header.
        source: The checkpoint that the model came from; what it has besides goes into the new file as it is.
        progress: For a torch file: how much was trained, in addition to what the source says of itself.

    Raises:
        UserError: A weight is not finite, or the file cannot be written.
    """
    parts = {"text_encoder": text_encoder, "vae": vae, "unet": unet, "v2": v2}
    tensors = ldm_state(**parts, stand_ins=source is None)
    kept = carried_over(source, tensors) if source else {}
    structure = ldm_structure(**parts)
    if path.suffix.lower() == ".safetensors":
        header = {"format": "pt", **(metadata or {}), **structure}
        write_tensors(path, tensors, kept=kept, dtype=dtype, metadata=header)
    else:
        counts = _counts(progress, source.extra if source else {}) if progress else {}
        write_tensors(path, tensors, kept=kept, dtype=dtype, extra={**counts, **structure})


def _counts(progress: Progress, before: Mapping[str, Any]) -> dict[str, int]:
    counts = {"epoch": progress.epoch, "global_step": progress.step}
    return {name: n + before[name] if isinstance(before.get(name), int) else n for name, n in counts.items()}


def _text_encoder(tensors: dict[str, Tensor], family: Family, carried: Config | None, where: str) -> PartWeights:
    if family == "sd1":
        text = ldm_keys.text_from_sd1(_below(tensors, ldm_keys.SD1_TEXT_PREFIX))
    else:
        open_clip = _below(tensors, ldm_keys.SD2_TEXT_PREFIX)
        layers = carried["num_hidden_layers"] if carried else ldm_keys.sd2_text_layers(open_clip)
        text = ldm_keys.text_from_sd2(open_clip, layers=layers)
    if not text:
        raise UserError(
            "the file has no text encoder",
            where=where,
            remedy="Give a whole Stable Diffusion model; this file holds a part of one.",
        )
    return PartWeights(carried or text_encoder_config(_shapes(text), family, where=where), text)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
