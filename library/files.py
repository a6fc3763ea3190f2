"""Tensor files: read without running code, write whole or not at all, describe and hash.

Reading never executes a pickle: ``.ckpt``, ``.pt`` and ``.bin`` go through :mod:`library.torch_files`. Writing
goes to a temporary name in the same folder, is flushed to disk and renamed, so a file under its final name is complete.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.disk_space import room_for
from library.errors import UserError
from library.tensor_headers import (
    DTYPE_NAMES,
    METADATA,
    HeaderError,
    check_tensors,
    is_archive,
    safetensors_header,
)
from library.torch_files import load_plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_SUFFIXES: Final = (".ckpt", ".pt", ".bin", ".pth")
_TEMPORARY_MARK: Final = ".writing-"
REPLACED_MARK: Final = ".replaced-"
_HALF_MADE: Final = re.compile(f"(?:{re.escape(_TEMPORARY_MARK)}[0-9a-f]{{8}}-)+(.+)", re.DOTALL)
LONGEST_NAME: Final = 255
"""Bytes of a file name, on every usual system."""
_RECORD: Final = 640
"""Bytes that a tensor takes in a torch file besides its numbers, about."""


@dataclass(frozen=True)
class TensorFile:
    """What a tensor file holds: tensors by name, text metadata, and numbers stored beside them (``.ckpt`` only)."""

    tensors: "dict[str, Tensor]"
    metadata: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def read_tensors(path: Path, *, mapped: bool = False) -> TensorFile:
    """Read a ``.safetensors`` file, or a torch file (any other suffix), to the CPU.

    A torch file may be a dict of tensors or hold one under ``state_dict``; other top-level values are returned in
    ``extra``.

    Args:
        path: The file.
        mapped: Map the tensors of a torch file into memory, so that only those in use are read; those of a
            ``.safetensors`` file always are. Files from before PyTorch 1.6 are read whole.

    Raises:
        UserError: The file is missing, damaged, no tensor file, or a pickle that asks for more than tensors.
    """
    if not path.is_file():
        raise UserError(f"file not found: {path.name}", where=str(path), remedy="Check the path.")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path, mapped=mapped and is_archive(path))


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"not a readable safetensors file: {error}",
            where=str(path),
            remedy="The file is damaged or incomplete: download or save it again.",
        ) from error


def _read_torch(path: Path, *, mapped: bool) -> TensorFile:
    import torch

    try:
        content = load_plain(path, mapped=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the file holds Python objects besides tensors, and loading them could run code",
            where=str(path),
            remedy="Convert it to .safetensors with a tool and a machine you trust, then use that file.",
        ) from error
    except Exception as error:  # whatever the bytes make the reader stumble over
        raise _unreadable_torch(path, error) from error
    if not isinstance(content, dict):
        raise UserError(
            f"expected named tensors, found {type(content).__name__}",
            where=str(path),
            remedy="Give a checkpoint file (a dictionary of tensors).",
        )
    inner = content.get("state_dict")
    source = inner if isinstance(inner, dict) else content
    tensors = {str(name): value for name, value in source.items() if isinstance(value, torch.Tensor)}
    try:
        check_tensors(tensors, path.stat().st_size)
    except HeaderError as error:
        raise _unreadable_torch(path, error) from error
    kept = content if source is not content else source
    extra = {str(k): v for k, v in kept.items() if not isinstance(v, torch.Tensor) and k != "state_dict"}
    return TensorFile(tensors, {}, extra)


def _unreadable_torch(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"not a readable torch file: {reason}",
        where=str(path),
        remedy="The file is damaged or not a model: download or save it again.",
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a ``.safetensors`` file, without reading its tensors; empty for every other file."""
    header = read_header(path)
    metadata: dict[str, str] = header.get(METADATA, {})
    return metadata


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a ``.safetensors`` file (names, dtypes, shapes), without importing torch; ``{}`` for others.

    Raises:
        UserError: The file has the suffix but no valid header.
    """
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return {}
    try:
        return safetensors_header(path)
    except (OSError, HeaderError) as error:
        raise UserError(
            f"not a readable safetensors file: {error}",
            where=str(path),
            remedy="The file is damaged or incomplete: download or save it again.",
        ) from error


@contextmanager
def written_whole(path: Path, *, size: int = 0) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block succeeds, flush it to disk and rename it to ``path``.

    Args:
        path: Final name.
        size: Bytes that will be written, as far as they are known: nothing is begun where they do not fit.

    Raises:
        CannotWriteError: The folder cannot be written to or the disk is full; ``path`` keeps what it had.
    """
    temporary = _temporary_beside(path)
    with room_for(path, size):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # Libraries that write through a private file leave it readable by its owner only.
            temporary.chmod(_usual_mode())
            _put_in_place(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _temporary_beside(path: Path) -> Path:
    """A free name in the folder of ``path`` that ends as its own does, without the start of a very long one."""
    lead, rest = f"{_TEMPORARY_MARK}{uuid.uuid4().hex[:8]}-", path.name
    while len(os.fsencode(lead + rest)) > LONGEST_NAME:
        rest = rest[1:]
    return path.with_name(lead + rest)


@contextmanager
def folder_written_whole(folder: Path, *, may_replace: Callable[[Path], bool], size: int = 0) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``; when the block succeeds, it gets the name of ``folder``.

    Args:
        folder: Final name.
        size: Bytes that will be written, as far as they are known: nothing is begun where they do not fit.
        may_replace: Whether what has that name may go; it goes after the new folder is complete. Otherwise the new
            folder is kept under a free name, and the error says which.

    Raises:
        CannotWriteError: The place cannot be written to; ``folder`` keeps what it had.
        UserError: The name is taken.
    """
    temporary = folder.with_name(f"{_TEMPORARY_MARK}{uuid.uuid4().hex[:8]}-{folder.name}")
    with room_for(folder, size):
        try:
            recover(folder)
            _remove_half_made(folder)
            temporary.mkdir(parents=True)
            yield temporary
            sync_folder(temporary)
            _put_folder_in_place(temporary, folder, may_replace)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames; finish one that was cut off after them."""
    replaced = folder.with_name(REPLACED_MARK + folder.name)
    if replaced.is_dir() and not folder.exists():
        # Another process of the run may have been quicker.
        with suppress(FileNotFoundError):
            os.replace(replaced, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_half_made(folder: Path) -> None:
    """Remove what killed processes have begun to write under the name of ``folder``."""
    for entry in folder.parent.iterdir() if folder.parent.is_dir() else ():
        half_made = _HALF_MADE.fullmatch(entry.name)
        if half_made and half_made[1] == folder.name and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def _put_folder_in_place(temporary: Path, folder: Path, may_replace: Callable[[Path], bool]) -> None:
    replaced = folder.with_name(REPLACED_MARK + folder.name)
    reason = "is something else, and is not replaced" if folder.exists() and not may_replace(folder) else ""
    if not reason:
        try:
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(temporary, folder)
        except PermissionError:
            reason = "is held by another program"
            if replaced.exists() and not folder.exists():
                os.replace(replaced, folder)
    if reason:
        kept = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:6]}")
        os.replace(temporary, kept)
        raise UserError(
            f"{folder.name} {reason}; the new content is in {kept.name}",
            where=str(folder.parent),
            remedy="Move what has the name out of the way, then rename the new folder.",
        )
    # What was replaced goes when nothing can undo the renames any more.
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a file or a folder: under its name it is there whole until it is gone.

    Raises:
        OSError: It cannot be removed.
    """
    if not path.is_dir():
        path.unlink()
        return
    going = _temporary_beside(path)
    os.replace(path, going)
    shutil.rmtree(going)


def sweep(folder: Path, owns: Callable[[str], bool]) -> None:
    """Mend what killed processes left directly below ``folder``; nobody may be writing there under a name it ``owns``.

    What was replaced while its replacement has no name yet gets its name back; everything else in the making goes.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name.startswith(REPLACED_MARK) and owns(entry.name.removeprefix(REPLACED_MARK)):
            recover(entry.with_name(entry.name.removeprefix(REPLACED_MARK)))
        elif (half_made := _HALF_MADE.fullmatch(entry.name)) and owns(half_made[1]):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether ``name`` is that of a file in the making, which stays behind only where its process was killed."""
    return name.startswith((_TEMPORARY_MARK, REPLACED_MARK))


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name; where another program holds that name, keep the file under a free one.

    Raises:
        UserError: The name is held, as Windows does for files that a program has open.
    """
    try:
        os.replace(temporary, path)
    except (PermissionError, IsADirectoryError) as error:
        kept = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:6]}{path.suffix}")
        os.replace(temporary, kept)
        reason = "is a folder" if path.is_dir() else "is held by another program"
        raise UserError(
            f"{path.name} {reason}; the new content is in {kept.name}",
            where=str(path.parent),
            remedy="Move the folder, or close the program that has the file open; then rename the new one.",
        ) from error


def _usual_mode() -> int:
    """The permissions of a new file; the only way to read the mask is to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with written_whole(path, size=len(content)) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str, *, errors: str = "strict") -> None:
    """Write ``content`` to ``path`` as UTF-8, whole or not at all; ``errors`` is that of ``str.encode``."""
    write_bytes(path, content.encode(errors=errors))


def write_json(path: Path, content: object) -> None:
    """Write ``content`` to ``path`` as indented JSON with sorted keys, whole or not at all."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # A name of a file need not be UTF-8; what replaces such a byte is what JSON has for it.
    write_text(path, text, errors="backslashreplace")


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
    kept: "Mapping[str, Tensor] | None" = None,
    metadata: Mapping[str, str] | None = None,
    dtype: "torch.dtype | None" = None,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write ``tensors`` to ``path``; the suffix chooses the format (``.safetensors``, otherwise a torch file).

    A ``.safetensors`` file is written tensor by tensor, so casting takes the memory of one tensor; a torch file takes
    that of all tensors that are cast or on another device.

    Args:
        path: Final name.
        tensors: Tensors by name, on any device.
        kept: Further tensors, written as they are, whatever they hold.
        metadata: Text for the safetensors header; a torch file has no place for it.
        dtype: Cast floating point tensors to this dtype; as they are when absent.
        extra: Values stored beside the tensors, under ``state_dict`` then (torch files only).

    Raises:
        UserError: A tensor is not finite (the file is not written), or the folder cannot be written to.
    """
    check_finite(tensors, dtype, path)
    dtypes = {name: dtype if dtype and tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    dtypes |= {name: tensor.dtype for name, tensor in (kept or {}).items()}
    everything = {**tensors, **(kept or {})}
    if path.suffix.lower() == ".safetensors":
        header, names, size = _safetensors_layout(everything, dtypes, metadata or {})
        with written_whole(path, size=size) as temporary:
            _write_safetensors(temporary, header, (everything[name].detach().to("cpu", dtypes[name]) for name in names))
            _check_whole(temporary)
        return
    import torch

    size = sum(tensor.numel() * dtypes[name].itemsize + _RECORD for name, tensor in everything.items())
    with written_whole(path, size=size) as temporary:
        ready = {name: _alone(tensor.detach().to("cpu", dtypes[name])) for name, tensor in everything.items()}
        # Given a name, the library would put it into the file.
        with temporary.open("wb") as file:
            torch.save({"state_dict": ready, **extra} if extra is not None else ready, file)
        _check_whole(temporary)


def check_finite(tensors: "Mapping[str, Tensor]", dtype: "torch.dtype | None", path: Path) -> None:
    """Refuse weights that are not finite in ``dtype`` (as they are when absent).

    Raises:
        UserError: One is not; ``path`` is where it was to be written.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach().to(dtype or tensor.dtype)).all()):
            raise UserError(
                f"refusing to save: {name} holds values that are not finite",
                where=str(path),
                remedy="Lower the learning rate, or use bf16 or fp32 instead of fp16; the previous file is kept.",
            )


def _safetensors_layout(
    tensors: "Mapping[str, Tensor]", dtypes: "Mapping[str, torch.dtype]", metadata: Mapping[str, str]
) -> tuple[bytes, list[str], int]:
    """Header, order of the tensors and size of a file: widest numbers first, so that all are aligned.

    The same content gives the same bytes, which the library's own writer doesn't promise for metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        kind = DTYPE_NAMES[str(dtypes[name]).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content = content.ljust(-(-len(content) // 8) * 8)
    return content, names, 8 + len(content) + end


def _write_safetensors(path: Path, header: bytes, tensors: "Iterable[Tensor]") -> None:
    """Header, then the bytes of one tensor after the other."""
    import torch

    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _check_whole(path: Path) -> None:
    """Look at a finished tensor file once more: an ``OSError`` for one that does not have the length it says."""
    try:
        if path.suffix.lower() == ".safetensors":
            safetensors_header(path)
        # The directory of an archive is its end.
        elif not zipfile.is_zipfile(path):
            raise HeaderError("it has no directory")
    except HeaderError as error:
        raise OSError("the file is not whole after writing") from error


def _alone(tensor: "Tensor") -> "Tensor":
    """``tensor`` in a storage of its own: a view would drag its whole storage into the file."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
