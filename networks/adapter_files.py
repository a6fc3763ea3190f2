"""What is in an adapter file, told from the names and shapes of its tensors alone (nothing heavy is imported)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.errors import UserError
from library.files import read_header, tensor_hashes, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]

DOWN: Final = ".lora_down.weight"
UP: Final = ".lora_up.weight"
ALPHA: Final = ".alpha"
OFT_BLOCKS: Final = ".oft_blocks"
OFT_PREFIX: Final = "oft_unet"

_OTHER_MODULE: Final = "or --network_module of the program that made this one."

# The first rule with a match wins: a DoRA or Tucker file holds lora_down and lora_up as well.
_KINDS: Final = (
    ("model.diffusion_model.", "a whole model"),
    ("emb_params", "a textual inversion embedding"),
    (".hada_w1", "a LoHa network"),
    (".lokr_w", "a LoKr network"),
    (OFT_BLOCKS, "OFT"),
    (".oft_", "an OFT network of another program"),
    (".dora_scale", "a DoRA network"),
    (".lora_mid.", "a LoCon network with Tucker decomposition"),
    ("lora_te1_", "a LoRA for SDXL"),
    ("lora_te2_", "a LoRA for SDXL"),
    (".lora_A.", "a LoRA in the layout of PEFT"),
    (".lora.down.", "a LoRA in an old layout of diffusers"),
    (".lora_linear_layer.", "a LoRA in an old layout of diffusers"),
    (DOWN, "LoRA"),
)


def shapes_in_file(path: Path) -> dict[str, Shape]:
    """Names and shapes of the tensors of a ``.safetensors`` file, from its header; empty for other formats.

    Raises:
        UserError: The header cannot be read.
    """
    header = read_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def kind_of(names: Iterable[str]) -> str:
    """What the tensors ``names`` make up: ``"LoRA"`` or ``"OFT"`` for what is read here, else a description."""
    names = list(names)
    for mark, kind in _KINDS:
        marked = [name for name in names if mark in name]
        if kind == "OFT" and not all(name.startswith(OFT_PREFIX) for name in marked):
            continue
        if marked:
            return kind
    return "no network that is known here"


def require_lora(names: Iterable[str], *, where: str, remedy: str | None = None) -> None:
    """Refuse the names of a file that the LoRA family cannot use.

    Args:
        names: Names of its tensors.
        where: The file, for the message.
        remedy: What to do, where there is no ``--network_module`` to be changed.

    Raises:
        UserError: Saying what the file is instead.
    """
    usual = f"Give a LoRA file, {_OTHER_MODULE}"
    _require("LoRA", "not a LoRA for Stable Diffusion 1 or 2", remedy or usual, names, where)


def require_oft(names: Iterable[str], *, where: str) -> None:
    """Refuse the names of a file that :mod:`networks.oft` cannot use.

    Raises:
        UserError: Saying what the file is instead.
    """
    _require("OFT", "not one of networks.oft", f"Give a file made with networks.oft, {_OTHER_MODULE}", names, where)


def _require(kind: str, but: str, remedy: str, names: Iterable[str], where: str) -> None:
    found = kind_of(names)
    if found != kind:
        described = f"a{'n' if found == 'OFT' else ''} {found} network" if found in ("LoRA", "OFT") else found
        raise UserError(f"the file is {described}, {but}", where=where, remedy=remedy)


def write_network(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None, dtype: "torch.dtype | None"
) -> None:
    """Write a network file with the hashes that programs know it by; the suffix chooses the format.

    Args:
        path: Final name.
        tensors: Its content, on any device.
        metadata: Text for the safetensors header.
        dtype: Cast the tensors to it; as they are when absent.

    Raises:
        UserError: A weight is not finite, or the folder cannot be written to.
    """
    content = {name: tensor.detach().to("cpu", dtype=dtype) for name, tensor in tensors.items()}
    described = dict(metadata or {})
    described["sshs_model_hash"], described["sshs_legacy_hash"] = tensor_hashes(content, described)
    write_tensors(path, content, metadata=described)


def is_pointwise_shape(shape: Shape) -> bool:
    """Whether a down weight of this shape belongs to a linear layer or a 1x1 convolution."""
    return len(shape) == 2 or shape[2:] == (1, 1)


def lora_dims(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Rank of each module of a LoRA file, by module name."""
    return {name.removesuffix(DOWN): shape[0] for name, shape in shapes.items() if name.endswith(DOWN) and shape}


def oft_blocks(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Number of blocks of each module of an OFT file, by module name."""
    return {
        name.removesuffix(OFT_BLOCKS): shape[0] for name, shape in shapes.items() if name.endswith(OFT_BLOCKS) and shape
    }
