"""Tensor files: read without running code, write whole or not at all, describe and hash.

Reading never executes a pickle: ``.ckpt``, ``.pt`` and ``.bin`` go through ``torch.load(weights_only=True)``. Writing
goes to a temporary name in the same folder, is flushed to disk and renamed, so a file under its final name is complete.
"""

import hashlib
import json
import os
import pickle
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_SUFFIXES: Final = (".ckpt", ".pt", ".bin", ".pth")
_TEMPORARY_MARK: Final = ".writing-"
_HASH_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class TensorFile:
    """What a tensor file holds: tensors by name, text metadata, and numbers stored beside them (``.ckpt`` only)."""

    tensors: "dict[str, Tensor]"
    metadata: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def read_tensors(path: Path) -> TensorFile:
    """Read a ``.safetensors`` file, or a torch file (any other suffix), to the CPU.

    A torch file may be a dict of tensors or hold one under ``state_dict``; other top-level values are returned in
    ``extra``.

    Raises:
        UserError: The file is missing, damaged, no tensor file, or a pickle that asks for more than tensors.
    """
    if not path.is_file():
        raise UserError(f"file not found: {path.name}", where=str(path), remedy="Check the path.")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"not a readable safetensors file: {error}",
            where=str(path),
            remedy="The file is damaged or incomplete: download or save it again.",
        ) from error


def _read_torch(path: Path) -> TensorFile:
    import torch

    try:
        # Stable Diffusion's first checkpoints name this class of their trainer; a name is all that is made of it.
        with torch.serialization.safe_globals(
            [(_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
        ):
            content = torch.load(str(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the file holds Python objects besides tensors, and loading them could run code",
            where=str(path),
            remedy="Convert it to .safetensors with a tool and a machine you trust, then use that file.",
        ) from error
    except Exception as error:  # whatever the bytes make the reader stumble over
        raise UserError(
            f"not a readable torch file: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(path),
            remedy="The file is damaged or not a model: download or save it again.",
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"expected named tensors, found {type(content).__name__}",
            where=str(path),
            remedy="Give a checkpoint file (a dictionary of tensors).",
        )
    inner = content.get("state_dict")
    source = inner if isinstance(inner, dict) else content
    tensors = {str(name): value for name, value in source.items() if isinstance(value, torch.Tensor)}
    kept = content if source is not content else source
    extra = {str(k): v for k, v in kept.items() if not isinstance(v, torch.Tensor) and k != "state_dict"}
    return TensorFile(tensors, {}, extra)


class _Ignored:
    """Stands for a class whose objects mean nothing here."""


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a ``.safetensors`` file, without reading its tensors; empty for every other file."""
    header = read_header(path)
    metadata = header.get("__metadata__", {}) if header else {}
    return {str(name): str(value) for name, value in metadata.items()}


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a ``.safetensors`` file (names, dtypes, shapes), without importing torch; ``{}`` for others.

    Raises:
        UserError: The file has the suffix but no valid header.
    """
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("the header is no table")
            return header
    except (OSError, ValueError, struct.error) as error:
        raise UserError(
            f"not a readable safetensors file: {error}",
            where=str(path),
            remedy="The file is damaged or incomplete: download or save it again.",
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block succeeds, flush it to disk and rename it to ``path``.

    Raises:
        UserError: The folder cannot be written to or the disk is full; ``path`` keeps what it had.
    """
    temporary = path.with_name(f"{_TEMPORARY_MARK}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # Libraries that write through a private file leave it readable by its owner only.
        temporary.chmod(_usual_mode())
        _put_in_place(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path.name}: {error.strerror or error}",
            where=str(path.parent),
            remedy="Free space on the disk or choose another folder; earlier files are untouched.",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_temporary(name: str) -> bool:
    """Whether ``name`` is that of a file in the making, which stays behind only where its process was killed."""
    return name.startswith(_TEMPORARY_MARK)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name; where another program holds that name, keep the file under a free one.

    Raises:
        UserError: The name is held, as Windows does for files that a program has open.
    """
    try:
        os.replace(temporary, path)
    except PermissionError as error:
        kept = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:6]}{path.suffix}")
        os.replace(temporary, kept)
        raise UserError(
            f"{path.name} is held by another program; the new content is in {kept.name}",
            where=str(path.parent),
            remedy="Close the program that has the file open, then rename the new one.",
        ) from error


def _usual_mode() -> int:
    """The permissions of a new file; the only way to read the mask is to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: object) -> None:
    """Write ``content`` to ``path`` as indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows has no handle for a folder and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(
    path: Path,
    tensors: "Mapping[str, Tensor]",
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: "torch.dtype | None" = None,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write ``tensors`` to ``path``; the suffix chooses the format (``.safetensors``, otherwise a torch file).

    Args:
        path: Final name.
        tensors: Tensors by name, on any device.
        metadata: Text for the safetensors header; a torch file has no place for it.
        dtype: Cast floating point tensors to this dtype; as they are when absent.
        extra: Values stored beside the tensors, under ``state_dict`` then (torch files only).

    Raises:
        UserError: A tensor is not finite (the file is not written), or the folder cannot be written to.
    """
    import torch

    ready = {name: _ready_to_save(name, tensor, dtype, path) for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import save_file

            save_file(ready, str(temporary), metadata=dict(metadata or {}) or None)
            _sort_header(temporary)
        else:
            torch.save({"state_dict": ready, **extra} if extra is not None else ready, str(temporary))


def _sort_header(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in another one every time."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if metadata := header.pop("__metadata__", None):
            header = {"__metadata__": dict(sorted(metadata.items())), **header}
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(content) <= length, "the same content is not longer"
        file.seek(8)
        file.write(content.ljust(length))


def _ready_to_save(name: str, tensor: "Tensor", dtype: "torch.dtype | None", path: Path) -> "Tensor":
    import torch

    tensor = tensor.detach().to("cpu", dtype=dtype if tensor.is_floating_point() else None).contiguous()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"refusing to save: {name} holds values that are not finite",
            where=str(path),
            remedy="Lower the learning rate, or use bf16 or fp32 instead of fp16; the previous file is kept.",
        )
    # A view would drag its whole storage into the file.
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def legacy_hash(content: bytes) -> str:
    """The web UI's old model hash: SHA-256 over 64 KiB from offset 1 MiB, first 8 hex digits."""
    return hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def legacy_hash_of_file(path: Path) -> str:
    """:func:`legacy_hash` of a file, reading only what it needs."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def tensor_hashes(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> tuple[str, str]:
    """``(sshs_model_hash, sshs_legacy_hash)`` of a network file.

    Both are of the safetensors bytes with only the ss_* metadata. The model hash covers what follows the header, so it
    depends on tensors alone; the legacy hash covers the header too.
    """
    from safetensors.torch import save

    kept = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=kept)
    (length,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(content[8 + length :]).hexdigest(), legacy_hash(content)
