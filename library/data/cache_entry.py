"""One file of the latent cache on disk: what is in it, what it was made of, and whether it is whole.

An entry is a ``.npz`` archive of NumPy arrays that other training programs read too: ``latents`` (the posterior's mean,
float32, (C, h, w), not scaled), ``original_size``, ``crop_ltrb`` and ``latents_flipped``. Ours holds the standard
deviations besides, and a text ``cache_entry`` that says what it was made of. A file without that text is *foreign*:
nothing tells which pixels and which VAE it comes from. Nothing is ever unpickled.

The archive's comment, which other programs skip, repeats that text with the places of the arrays and a checksum of the
whole file: so an entry is checked and read without taking the archive apart, several times as fast.
"""

import hashlib
import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from library.data.images import ImageView, centre_origin, filter_of
from library.data.spec import Size
from library.files import write_bytes

ENCODING_VERSION: Final = 1
"""Raised whenever the same file would become other latents: decoding, resizing, cropping, composing on a background."""

LATENT_PIXELS: Final = 8
"""Pixels of an image along one latent."""

_FACTS: Final = "cache_entry"
_MARK: Final = b"latents1"
"""Ends the comment of our archives; before it stand the checksum and the length of the description, in hexadecimal."""
_CHECKSUM_BYTES: Final = 32
_LENGTH_BYTES: Final = 8
_ARRAYS: Final = ("latents", "latents_std", "latents_flipped", "latents_flipped_std")
_SAME_FILTER: Final[Mapping[str, str]] = {"linear": "bilinear", "cubic": "bicubic"}
_CHUNK: Final = 1 << 20

Latents = NDArray[np.float32]


class UnusableEntryError(Exception):
    """The file is no entry that can be used; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an image becomes latents.

    Attributes:
        bucket: Size after the crop.
        resized: Size before it.
        origin: Left and top of the crop.
        interpolation: The resize filter; ``none`` where the image keeps its size.
        vae: Digest of the VAE's encoder, its precision included.
        version: :data:`ENCODING_VERSION` of the program.
    """

    bucket: Size
    resized: Size
    origin: Size
    interpolation: str
    vae: str
    version: int

    @classmethod
    def of(cls, view: ImageView, vae: str) -> "Settings":
        """What ``view`` is encoded with."""
        bucket, resized = view.placement.bucket, view.placement.resized
        name = filter_of(view.size, resized, view.interpolation)
        return cls(
            bucket=bucket,
            resized=resized,
            origin=centre_origin((resized[0] - bucket[0], resized[1] - bucket[1])),
            interpolation=_SAME_FILTER.get(name, name),
            vae=vae,
            version=ENCODING_VERSION,
        )

    def digest(self) -> str:
        """Eight hexadecimal digits that tell these settings from others."""
        return _digest(json.dumps(asdict(self), sort_keys=True).encode(), size=4)

    def difference(self, wanted: "Settings") -> str | None:
        """What was other than is ``wanted``; None when the two are the same."""
        if self.version != wanted.version:
            return f"of another version of the encoding: {self.version} instead of {wanted.version}"
        if self.bucket != wanted.bucket:
            return f"made for another size: {_size(self.bucket)} instead of {_size(wanted.bucket)}"
        if (self.resized, self.origin) != (wanted.resized, wanted.origin):
            return (
                f"made with another crop: {_size(self.resized)} cut at {self.origin} instead of "
                f"{_size(wanted.resized)} at {wanted.origin}"
            )
        if self.interpolation != wanted.interpolation:
            return f"made with another interpolation: {self.interpolation} instead of {wanted.interpolation}"
        return None if self.vae == wanted.vae else "made with another VAE, or in another precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image file as it was when it was encoded.

    Attributes:
        size: In bytes.
        mtime_ns: Time of its last change, in nanoseconds.
        content: Digest of its bytes.
    """

    size: int
    mtime_ns: int
    content: str

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Read ``path``. Its time is taken first, so that a change in between is seen next time.

        Raises:
            OSError: It cannot be read.
        """
        status = path.stat()
        return cls(size=status.st_size, mtime_ns=status.st_mtime_ns, content=content_digest(path))

    def looks_like(self, path: Path) -> bool:
        """Whether size and time of ``path`` are still the same, without reading it."""
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The latents of an image, and what they were made of.

    Attributes:
        mean: (C, h, w) float32, the posterior's mean, or the sample of a foreign file.
        std: Its standard deviation; zero for a sample.
        mirrored: The two of the mirrored image, where they were made.
        original_size: Size of the image as displayed.
        settings: How it was made; None for a foreign file.
        source: What it was made of; None for a foreign file.
    """

    mean: Latents
    std: Latents
    mirrored: tuple[Latents, Latents] | None
    original_size: Size
    settings: Settings | None = None
    source: Source | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether another program has written it."""
        return self.settings is None

    def pair(self, *, flipped: bool) -> tuple[Latents, Latents] | None:
        """Mean and standard deviation, None when the mirrored ones are asked for and were not made."""
        return self.mirrored if flipped else (self.mean, self.std)

    def fits(self, bucket: Size) -> bool:
        """Whether the latents are those of an image of the size of ``bucket``."""
        return self.mean.shape[1:] == (bucket[1] // LATENT_PIXELS, bucket[0] // LATENT_PIXELS)


def content_digest(path: Path) -> str:
    """BLAKE2b of the bytes of ``path``, 128 bits in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_entry(path: Path, entry: Entry) -> None:
    """Write our ``entry`` to ``path``, whole or not at all.

    Raises:
        UserError: The folder cannot be written to or the disk is full.
    """
    assert entry.settings is not None, "only our own entries are written"
    assert entry.source is not None, "only our own entries are written"
    left, top = entry.settings.origin
    width, height = entry.settings.bucket
    arrays: dict[str, NDArray[Any]] = {
        "latents": entry.mean,
        "latents_std": entry.std,
        "original_size": np.array(entry.original_size, np.int64),
        "crop_ltrb": np.array((left, top, left + width, top + height), np.int64),
    }
    if entry.mirrored is not None:
        arrays["latents_flipped"], arrays["latents_flipped_std"] = entry.mirrored
    # In the order in which they are read back.
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    facts = {"settings": asdict(entry.settings), "source": asdict(entry.source), "original_size": entry.original_size}
    arrays[_FACTS] = np.array(json.dumps(facts, sort_keys=True).encode())
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    description = json.dumps({**facts, "arrays": _whereabouts(buffer, arrays)}, sort_keys=True).encode()
    archive = bytearray(buffer.getvalue())
    # An archive ends with the length of its comment.
    length = len(description) + _CHECKSUM_BYTES + _LENGTH_BYTES + len(_MARK)
    archive[-2:] = struct.pack("<H", length)
    archive += description
    archive += f"{_checksum(archive)}{len(description):0{_LENGTH_BYTES}x}".encode() + _MARK
    write_bytes(path, bytes(archive))


def _whereabouts(archive: io.BytesIO, arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Position of the first number and shape of each array of latents, which lie in ``archive`` uncompressed."""
    found = {}
    content = archive.getvalue()
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            name = member.filename.removesuffix(".npy")
            if name in _ARRAYS:
                # The lengths of name and extra field end the fixed 30 bytes before each member.
                lengths = struct.unpack_from("<HH", content, member.header_offset + 26)
                end = member.header_offset + 30 + sum(lengths) + member.file_size
                found[name] = (end - arrays[name].nbytes, arrays[name].shape)
    return found


def read_entry(path: Path) -> Entry:
    """The entry in ``path``, ours or foreign, if it is whole.

    Raises:
        FileNotFoundError: There is none.
        UnusableEntryError: It is damaged, or of a kind without the facts that could vouch for it.
    """
    try:
        content = bytearray(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableEntryError(f"cannot be read: {error.strerror or error}") from error
    if content.endswith(_MARK):
        return _ours(content)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever the bytes make the reader stumble over
        raise UnusableEntryError("damaged: not a whole .npz file") from error
    if _FACTS in arrays:
        raise UnusableEntryError("damaged: another program has changed it")
    return _foreign(arrays)


def _ours(content: bytearray) -> Entry:
    length_at = len(content) - len(_MARK) - _LENGTH_BYTES
    checksum_at = length_at - _CHECKSUM_BYTES
    if checksum_at < 0 or content[checksum_at:length_at] != _checksum(content[:checksum_at]).encode():
        raise UnusableEntryError("damaged: the checksum differs")
    try:
        description = json.loads(content[checksum_at - int(content[length_at : -len(_MARK)], 16) : checksum_at])
        settings = description["settings"]
        for name in ("bucket", "resized", "origin"):
            settings[name] = tuple(settings[name])
        arrays = {name: _array(content, *where) for name, where in description["arrays"].items()}
        width, height = description["original_size"]
        return Entry(
            mean=arrays["latents"],
            std=arrays["latents_std"],
            mirrored=(arrays["latents_flipped"], arrays["latents_flipped_std"]) if len(arrays) > 2 else None,
            original_size=(width, height),
            settings=Settings(**settings),
            source=Source(**description["source"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UnusableEntryError("damaged: its description cannot be read") from error


def _array(content: bytearray, position: int, shape: Sequence[int]) -> Latents:
    return np.frombuffer(content, np.float32, math.prod(shape), position).reshape(shape)


def _foreign(arrays: Mapping[str, NDArray[Any]]) -> Entry:
    if "arr_0" in arrays:
        raise UnusableEntryError("in an old format that does not say which image size it is for")
    missing = [name for name in ("latents", "original_size", "crop_ltrb") if name not in arrays]
    if missing:
        raise UnusableEntryError(f"not a file of latents: no {', '.join(missing)}")
    size = arrays["original_size"].ravel().tolist()
    if len(size) != 2:
        raise UnusableEntryError("not a file of latents: original_size is no width and height")
    latents, flipped = _sample(arrays["latents"]), arrays.get("latents_flipped")
    mirrored = None if flipped is None else _sample(flipped)
    if mirrored is not None and mirrored.shape != latents.shape:
        raise UnusableEntryError("not a file of latents: the mirrored ones have another size")
    return Entry(
        mean=latents,
        std=np.zeros_like(latents),
        mirrored=None if mirrored is None else (mirrored, np.zeros_like(mirrored)),
        original_size=(int(size[0]), int(size[1])),
    )


def _sample(values: NDArray[Any]) -> Latents:
    if values.ndim != 3 or values.dtype.kind != "f":
        raise UnusableEntryError("not a file of latents: not an array (channels, height, width)")
    sample: Latents = values.astype(np.float32)
    if not np.isfinite(sample).all():
        raise UnusableEntryError("holds values that are not finite")
    return sample


def _checksum(content: bytes | bytearray) -> str:
    return _digest(content, size=_CHECKSUM_BYTES // 2)


def _digest(content: bytes | bytearray, *, size: int) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
