"""What a weight file holds, told by the names in it without loading it."""

import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from library.errors import UserError
from library.files import TORCH_SUFFIXES, read_header
from library.models.ldm_keys import SD1_TEXT_PREFIX, SD2_TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from library.models.variant import Family
from library.tensor_headers import check_archive

MODEL_FLAG: Final = "--pretrained_model_name_or_path"
VAE_FLAG: Final = "--vae"
MODEL_SUFFIXES: Final = (".safetensors", *TORCH_SUFFIXES)
MODEL_REMEDY: Final = (
    "Give a Stable Diffusion 1.x or 2.x model: a .safetensors or .ckpt file, a Diffusers folder or a hub id."
)
VAE_REMEDY: Final = (
    "Give a Stable Diffusion VAE: a checkpoint (whole or VAE only), a Diffusers .bin file or folder, or a hub id."
)

_DAMAGE: Final = (
    *(OSError, EOFError, ValueError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What a damaged archive, or the list of names in it, makes Python's readers raise."""

Names = Mapping[str, tuple[int, ...]]
"""Weights by name; the shape is empty where the file doesn't tell it cheaply."""


def tensor_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Names of the tensors in a file, with shapes from ``.safetensors``; nothing for a torch file of the oldest format.

    A torch file's list of names is looked through without running anything in it.

    Raises:
        UserError: The file is no weight file, or a ``.safetensors`` file without a valid header.
    """
    if path.suffix.lower() == ".safetensors":
        header = read_header(path)
        return {name: tuple(facts["shape"]) for name, facts in header.items() if name != "__metadata__"}
    with path.open("rb") as file:
        start = file.read(2)
    # A torch file is a zip archive, or before PyTorch 1.6 a bare pickle.
    if start != b"PK" and start[:1] != b"\x80":
        raise UserError(
            f"{path.name} is not a model file",
            where=str(path),
            remedy="Check that it is the model itself, and not a page or a link saved under its name.",
        )
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            (entry,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            listing = archive.read(entry)
        texts = [argument for opcode, argument, _ in pickletools.genops(listing) if "UNICODE" in opcode.name]
    except _DAMAGE:
        # What is wrong with it is said when it is loaded, before anything of it is used.
        return {}
    return {text: () for text in texts if isinstance(text, str)}


def checkpoint_family(names: Iterable[str], *, where: str, remedy: str = MODEL_REMEDY) -> Family:
    """SD1 or SD2, by the names in a checkpoint.

    Raises:
        UserError: The names are of something else; the message says of what.
    """
    known: Names = dict.fromkeys(names, ())
    if _has(UNET_PREFIX)(known):
        if _has(SD2_TEXT_PREFIX)(known):
            return "sd2"
        if _has(SD1_TEXT_PREFIX)(known):
            return "sd1"
    raise UserError(f"this is not a Stable Diffusion 1.x or 2.x model: {_what_is(known)}", where=where, remedy=remedy)


def check_vae(names: Iterable[str], *, where: str) -> None:
    """Refuse a file without a VAE of Stable Diffusion 1.x or 2.x, by the names in it.

    Raises:
        UserError: The names are of something else; the message says of what.
    """
    known: Names = dict.fromkeys(names, ())
    if _is_sdxl(known) or not (_has(VAE_PREFIX)(known) or _is_bare_vae(known)):
        raise UserError(f"this is not a VAE for Stable Diffusion: {_what_is(known)}", where=where, remedy=VAE_REMEDY)


def _has(*prefixes: str) -> Callable[[Names], bool]:
    return lambda names: any(name.startswith(prefixes) for name in names)


def _is_bare_vae(names: Names) -> bool:
    return "encoder.conv_in.weight" in names and "decoder.conv_in.weight" in names


def _is_vae_alone(names: Names) -> bool:
    return _is_bare_vae(names) or (_has(VAE_PREFIX)(names) and not _has(UNET_PREFIX)(names))


def _is_adapter(names: Names) -> bool:
    marks = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w", ".lokr_w", ".oft_blocks")
    return any(mark in name for name in names for mark in marks)


def _is_embedding(names: Names) -> bool:
    return bool({"emb_params", "string_to_param"} & set(names))


_is_sdxl = _has("conditioner.embedders.")
_KINDS: Final[tuple[tuple[str, Callable[[Names], bool]], ...]] = (
    ("it is a LoRA or another adapter, which is added to a model", _is_adapter),
    ("it is an SDXL model", _is_sdxl),
    ("it is an SD3 model", _has("model.diffusion_model.joint_blocks.", "joint_blocks.")),
    ("it is a Flux model", _has("model.diffusion_model.double_blocks.", "double_blocks.")),
    ("it is a ControlNet", _has("control_model.", "controlnet_")),
    ("it is a textual inversion embedding", _is_embedding),
    ("it is a VAE alone", _is_vae_alone),
    ("it has no text encoder", _has(UNET_PREFIX)),
    ("it is the U-Net of a Diffusers folder", _has("down_blocks.")),
    ("it is a text encoder alone", _has("text_model.", SD1_TEXT_PREFIX, SD2_TEXT_PREFIX)),
)


def _what_is(names: Names) -> str:
    for description, fits in _KINDS:
        if fits(names):
            return description
    some = ([name for name in names if "." in name] or list(names))[:3]
    return f"it holds {', '.join(some) or 'nothing'}" + (" and more" if len(names) > len(some) else "")
