"""What tensor files say of themselves, checked before anything relies on it; nothing heavy is imported.

A ``.safetensors`` file says where each tensor lies, a torch file is an archive with a directory. Where such a statement
is not true (a tensor larger than the file, two in one place, an archive that would grow when it is unpacked), the file
is refused, so that no file takes more memory than its own size accounts for.
"""

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.documents import parse_json

if TYPE_CHECKING:
    from torch import Tensor

METADATA: Final = "__metadata__"

DTYPE_NAMES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip
"""What the header of a ``.safetensors`` file calls torch's dtypes."""

_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_PIECE: Final = 1 << 20
_LONGEST_HEADER: Final = 100_000_000
"""Bytes; the limit of the format."""

_MOST_AXES: Final = 16
_LONGEST_AXIS: Final = 2**40
_SHARING: Final = 4
"""How many times a torch file's bytes may be used by its tensors: tied weights share theirs."""


class HeaderError(ValueError):
    """What a tensor file says of itself is not true, or cannot be read; the message says how."""


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a ``.safetensors`` file: text metadata, and dtype, shape and place of each tensor.

    Raises:
        HeaderError: It is not the header of this file.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise HeaderError("it has no header")
        (length,) = struct.unpack("<Q", start)
        size = path.stat().st_size - 8
        if length > min(size, _LONGEST_HEADER):
            raise HeaderError("the header is longer than the file")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise HeaderError(f"the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("the header is no table")
    texts = header.get(METADATA, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise HeaderError("the metadata is no table of texts")
    _check_places((_place(name, facts) for name, facts in header.items() if name != METADATA), size - length)
    return header


def stored_tensors(path: Path) -> Iterator[bytes]:
    """Name, shape and dtype of each tensor of a ``.safetensors`` file, then its bytes in pieces; sorted by name.

    Read piece by piece: mapped, a whole model would count as memory in use.

    Raises:
        HeaderError: The header is not that of this file.
        OSError: The file cannot be read.
    """
    header = safetensors_header(path)
    kinds = {kind: name for name, kind in DTYPE_NAMES.items()}
    with path.open("rb") as file:
        begin = 8 + struct.unpack("<Q", file.read(8))[0]
        for name, facts in sorted(header.items()):
            if name == METADATA:
                continue
            yield f"{name} {tuple(facts['shape'])} torch.{kinds[facts['dtype']]}".encode()
            start, end = facts["data_offsets"]
            file.seek(begin + start)
            for place in range(start, end, _PIECE):
                yield file.read(min(_PIECE, end - place))


def _place(name: str, facts: object) -> tuple[int, int]:
    """Begin and end of a tensor behind the header."""
    known = isinstance(facts, dict) and _BYTES.get(str(facts.get("dtype")))
    if not isinstance(facts, dict) or not known:
        raise HeaderError(f"{name} has no dtype that is known")
    shape, offsets = _counts(facts.get("shape")), _counts(facts.get("data_offsets"))
    if shape is None or len(shape) > _MOST_AXES:
        raise HeaderError(f"{name} has no shape")
    if offsets is None or len(offsets) != 2:
        raise HeaderError(f"{name} has no place")
    start, end = offsets
    if end - start != math.prod(shape) * known:
        raise HeaderError(f"{name} has another size than its shape")
    return start, end


def _counts(values: object) -> list[int] | None:
    """``values`` if it is a list of whole numbers that may count something."""
    if isinstance(values, list) and all(type(value) is int and 0 <= value <= _LONGEST_AXIS for value in values):
        return values
    return None


def _check_places(places: Iterable[tuple[int, int]], size: int) -> None:
    """Refuse tensors that overlap, leave a gap, or do not end where the file does."""
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise HeaderError("tensors overlap, or there is a gap between them")
        end = stop
    if end != size:
        raise HeaderError(f"the tensors have {end} bytes, and the file has {size} for them")


def is_archive(path: Path) -> bool:
    """Whether ``path`` is an archive, if only a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def check_archive(path: Path) -> None:
    """Refuse an archive that grows when it is unpacked; what is no archive is left to its reader.

    Raises:
        HeaderError: It does.
        OSError: The file cannot be read.
    """
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise HeaderError(f"its directory cannot be read: {error}") from error
    if unpacked > path.stat().st_size:
        raise HeaderError("it grows when it is unpacked, as no file of tensors does")


def check_tensors(tensors: "Mapping[str, Tensor]", size: int) -> None:
    """Refuse tensors that would need more memory than a file of ``size`` bytes accounts for.

    Raises:
        HeaderError: A tensor is no plain array, repeats its numbers, or all together are too large.
    """
    import torch

    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise HeaderError(f"{name} is no plain array")
        if min(tensor.shape, default=0) < 0:
            raise HeaderError(f"{name} has no shape")
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes() or total > _SHARING * size:
            raise HeaderError(f"{name} is larger than what the file holds of it")
