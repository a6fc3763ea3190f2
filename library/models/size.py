"""How large a model is, told from the shapes in its files before anything is loaded."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from library.errors import UserError
from library.models.detect import PARTS, describe_source, weight_file
from library.models.ldm_keys import SD1_TEXT_PREFIX, SD2_TEXT_PREFIX, UNET_PREFIX
from library.models.recognise import tensor_names

# Tensors beside the text encoder that checkpoints hold.
_UNUSED: Final = ("position_ids", "text_projection", "logit_scale")
_TOKEN_TABLE: Final = "token_embedding.weight"
_SD2_LAYER: Final = re.compile(re.escape(SD2_TEXT_PREFIX) + r"transformer\.resblocks\.(\d+)\..*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Numbers of values.

    Attributes:
        unet: Of the U-Net.
        text_encoder: Of the text encoder.
        total: Of everything in the file, or in the three folders with weights.
    """

    unet: int
    text_encoder: int
    total: int


def size_of_model(source: str | None) -> ModelSize | None:
    """The size of the model at ``source``; None where only loading tells."""
    try:
        facts = describe_source(source)
        if facts.path is None:
            return None
        size = _size_of_file(facts.path) if facts.kind == "file" else _size_of_folder(facts.path)
    except UserError:
        return None
    return size if size.unet and size.text_encoder else None


def text_width_of_model(source: str | None) -> int | None:
    """The width of the text encoder's embeddings at ``source``; None where only loading tells."""
    try:
        facts = describe_source(source)
        if facts.path is None:
            return None
        file = facts.path if facts.kind == "file" else weight_file(facts.path / "text_encoder", "text_encoder")
        shapes = [shape for name, shape in tensor_names(file).items() if name.endswith(_TOKEN_TABLE) and shape]
    except UserError:
        return None
    return shapes[0][-1] if shapes else None


def _size_of_folder(folder: Path) -> ModelSize:
    values = {part: _values(tensor_names(weight_file(folder / part, part))) for part in PARTS}
    return ModelSize(unet=values["unet"], text_encoder=values["text_encoder"], total=sum(values.values()))


def _size_of_file(path: Path) -> ModelSize:
    shapes = tensor_names(path)
    layers = {int(found[1]) for name in shapes if (found := _SD2_LAYER.fullmatch(name))}
    # The last layer of SD2's text encoder is not used.
    unused = f"{SD2_TEXT_PREFIX}transformer.resblocks.{max(layers, default=0)}."
    text = {
        name: shape
        for name, shape in shapes.items()
        if name.startswith((SD1_TEXT_PREFIX, SD2_TEXT_PREFIX)) and not name.startswith(unused)
    }
    unet = {name: shape for name, shape in shapes.items() if name.startswith(UNET_PREFIX)}
    return ModelSize(unet=_values(unet), text_encoder=_values(text), total=_values(shapes))


def _values(shapes: dict[str, tuple[int, ...]]) -> int:
    # Torch files have empty shapes here; a number without dimensions is among the unused ones.
    return sum(math.prod(shape) for name, shape in shapes.items() if shape and not name.endswith(_UNUSED))
