"""Files of textual inversion: what is in them, and how they are read and written.

An ordinary file has one tensor (vectors, text width), a file of the extended kind (XTI) one for each of the 16 layers.
Importing this module imports nothing heavy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.errors import Problem, UserError
from library.files import read_header, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

LAYERS: Final = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08"),
    "MID",
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)
"""The U-Net's blocks with cross-attention in the order they compute, by the names that files give them."""

EMBEDDING: Final = "emb_params"
_FLAG: Final = "--weights"


def check_embedding_file(path: Path, *, vectors: int, layered: bool) -> list[Problem]:
    """What a ``.safetensors`` file's header tells against starting from it; nothing for other formats.

    Args:
        path: The file.
        vectors: Vectors of the new word.
        layered: Whether the word has vectors for every layer.
    """
    try:
        header = read_header(path)
        shapes = {name: tuple(facts["shape"]) for name, facts in header.items() if name != "__metadata__"}
        if shapes:
            _check_shapes(shapes, vectors=vectors, layered=layered, where=f"{_FLAG} {path}")
    except UserError as error:
        return list(error.problems)
    return []


def read_embedding(path: Path, *, vectors: int, width: int, layered: bool) -> "Tensor":
    """The rows that ``path`` has for a word of ``vectors`` vectors, float32.

    Read are ``emb_params`` files, the web interface's ``.pt`` (``string_to_param``), a single tensor of any name, and
    the 16 tensors of an extended file.

    Args:
        path: The file; ``.safetensors``, or a torch file.
        vectors: Vectors of the word.
        width: The text encoder's width.
        layered: Whether the word has vectors for every layer. Each of them begins with what an ordinary file has.

    Returns:
        (vectors, width); layered (16 * vectors, width), layer by layer.

    Raises:
        UserError: It is no such file, or one for another number of vectors or another model.
    """
    import torch

    where = f"{_FLAG} {path}"
    tensors = _read(path)
    rows = {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}
    _check_shapes({name: tuple(row.shape) for name, row in rows.items()}, vectors=vectors, layered=layered, where=where)
    parts = [rows[layer] for layer in LAYERS] if layered and _is_layered(rows) else [*rows.values()][:1]
    if layered and len(parts) == 1:
        parts = parts * len(LAYERS)
    found = torch.cat(parts).detach().float()
    if found.shape[1] != width:
        raise UserError(
            f"the embedding is {found.shape[1]} wide, the model's text encoder {width}",
            where=where,
            remedy="Stable Diffusion 1 has 768, Stable Diffusion 2 has 1024: use a file made with such a model.",
        )
    return found


class _Parameters:
    """Stands for torch's ``ParameterDict``, which the first files held; nothing but its parameters is looked at."""


def _read(path: Path) -> "dict[str, Tensor]":
    """The tensors of ``path``; those of the web interface's ``.pt`` lie one level deeper."""
    import torch

    with torch.serialization.safe_globals([(_Parameters, "torch.nn.modules.container.ParameterDict")]):
        file = read_tensors(path)
    inner = file.extra.get("string_to_param")
    if isinstance(inner, _Parameters):
        inner = vars(inner).get("_parameters")
    if not isinstance(inner, Mapping):
        return file.tensors
    return {str(name): value for name, value in inner.items() if isinstance(value, torch.Tensor)}


def _is_layered(names: Mapping[str, object]) -> bool:
    return set(names) == set(LAYERS)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], *, vectors: int, layered: bool, where: str) -> None:
    """Refuse a file by the names and shapes of its tensors.

    Raises:
        UserError: It cannot be what the word begins with.
    """
    if _is_layered(shapes) and not layered:
        raise UserError(
            "the file has an embedding for each of 16 layers (XTI)",
            where=where,
            remedy="Go on with train_textual_inversion_XTI.py.",
        )
    if len(shapes) != 1 and not _is_layered(shapes):
        what = "an embedding for SDXL" if "clip_g" in shapes else f"no embedding ({len(shapes)} tensors)"
        raise UserError(f"the file is {what}", where=where, remedy="Give a file that textual inversion has written.")
    for name, shape in shapes.items():
        if len(shape) not in (1, 2):
            raise UserError(
                f"{name} has the shape {shape}, which is no embedding", where=where, remedy="Give another file."
            )
        count = shape[0] if len(shape) == 2 else 1
        if count != vectors:
            raise UserError(
                f"the file has {count} vectors, the new word {vectors}",
                where=f"{where}, --num_vectors_per_token",
                remedy=f"Set --num_vectors_per_token={count}, or leave --weights out.",
            )


def embedding_tensors(rows: "Tensor", *, token: str, suffix: str) -> dict[str, "Tensor"]:
    """What an ordinary file holds of ``rows`` (vectors, width): by its own name, or by the token in a ``.bin``."""
    if suffix == ".bin":
        return {token: rows[0] if len(rows) == 1 else rows}
    return {EMBEDDING: rows}


def layered_tensors(rows: "Tensor") -> dict[str, "Tensor"]:
    """What an extended file holds of ``rows`` (16 * vectors, width): one tensor (vectors, width) a layer."""
    return dict(zip(LAYERS, rows.chunk(len(LAYERS)), strict=True))
