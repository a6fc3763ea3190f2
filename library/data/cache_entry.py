"""One file of the latent cache on disk: what is in it, what it was made of, and whether it is whole.

An entry is a ``.npz`` archive of NumPy arrays that other training programs read too: ``latents`` (the posterior's mean,
float32, (C, h, w), not scaled), ``original_size``, ``crop_ltrb``, ``latents_flipped`` and ``alpha_mask`` (float32,
(H, W), 0..1). Ours holds the standard deviations besides, and a text ``cache_entry`` that says what it was made of. A
file without that text is *foreign*: nothing tells which pixels and which VAE it comes from. The oldest of them are
pairs, ``a.npz`` and ``a_flip.npz``, each with one array ``arr_0`` and no word about the image's size. Nothing is ever
unpickled.

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

from library.data.folders import IMAGE_SUFFIXES
from library.data.images import ImageView, centre_origin, filter_of
from library.data.spec import Size, size_text
from library.documents import parse_json
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
_ARRAYS: Final = ("latents", "latents_std", "latents_flipped", "latents_flipped_std", "alpha_mask")
_OLD_ARRAY: Final = "arr_0"
_KNOWN: Final = frozenset((*_ARRAYS, _FACTS, _OLD_ARRAY, "original_size", "crop_ltrb"))
_LARGEST: Final = 1 << 28
"""Bytes of an archive, unpacked: several times those of the largest image that is trained on."""

_LONGEST_SIDE: Final = 1 << 30
_OLD_MIRRORED: Final = "_flip"
"""Ends the stem of the older files with mirrored latents."""
_SAME_FILTER: Final[Mapping[str, str]] = {"linear": "bilinear", "cubic": "bicubic"}
_CHANNELS: Final = 4
_BESIDES: Final = 2500
"""Bytes of an entry besides its arrays, about."""

Latents = NDArray[np.float32]
Mask = NDArray[np.float32]


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
            return f"made for another size: {size_text(self.bucket)} instead of {size_text(wanted.bucket)}"
        if (self.resized, self.origin) != (wanted.resized, wanted.origin):
            return (
                f"made with another crop: {size_text(self.resized)} cut at {self.origin} instead of "
                f"{size_text(wanted.resized)} at {wanted.origin}"
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
        original_size: Size of the image as displayed; None for a file of the older kind, which does not say it.
        mask: (H, W) float32 in 0..1, the opacity of the image's pixels after resize and crop; ones for an image without
            transparency. None where it was not asked for.
        settings: How it was made; None for a foreign file.
        source: What it was made of; None for a foreign file.
    """

    mean: Latents
    std: Latents
    mirrored: tuple[Latents, Latents] | None
    original_size: Size | None
    mask: Mask | None = None
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
        return self.bucket == bucket

    @property
    def bucket(self) -> Size:
        """Size in pixels of what was encoded."""
        return self.mean.shape[2] * LATENT_PIXELS, self.mean.shape[1] * LATENT_PIXELS

    @property
    def opacity(self) -> NDArray[np.uint8] | None:
        """The mask as whole numbers, (H, W) in 0..255."""
        return None if self.mask is None else np.rint(self.mask * 255).astype(np.uint8)

    @property
    def has_right_mask(self) -> bool:
        """Whether there is a mask, and it has the size of what was encoded."""
        return self.mask is not None and self.mask.shape == (self.bucket[1], self.bucket[0])


def content_digest(path: Path) -> str:
    """BLAKE2b of the bytes of ``path``, 128 bits in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def size_of(bucket: Size, *, flip: bool, mask: bool) -> int:
    """About the bytes that an entry for ``bucket`` takes."""
    width, height = bucket
    values = _CHANNELS * (width // LATENT_PIXELS) * (height // LATENT_PIXELS) * (4 if flip else 2)
    return 4 * (values + width * height * mask) + _BESIDES


def write_entry(path: Path, entry: Entry) -> None:
    """Write our ``entry`` to ``path``, whole or not at all.

    Raises:
        UserError: The folder cannot be written to or the disk is full.
    """
    assert entry.settings is not None, "only our own entries are written"
    assert entry.source is not None, "only our own entries are written"
    assert entry.original_size is not None, "only our own entries are written"
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
    if entry.mask is not None:
        arrays["alpha_mask"] = entry.mask
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
    arrays = _unpacked(content, path.name)
    if _FACTS in arrays:
        raise UnusableEntryError("damaged: another program has changed it")
    return _old(arrays, path) if _OLD_ARRAY in arrays else _foreign(arrays)


def _unpacked(content: bytes | bytearray, name: str) -> dict[str, NDArray[Any]]:
    """The arrays of an archive, which is called ``name``, as far as anything is made of them."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > _LARGEST:
            raise UnusableEntryError(f"{name} would have {size:,} bytes when it is unpacked, as no latents do")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {known: archive[known] for known in archive.files if known in _KNOWN}
    except UnusableEntryError:
        raise
    except Exception as error:  # whatever the bytes make the reader stumble over
        raise UnusableEntryError(f"damaged: {name} is not a whole .npz file") from error
    # What has no head of an array comes as bytes.
    if not all(isinstance(values, np.ndarray) for values in arrays.values()):
        raise UnusableEntryError(f"damaged: {name} holds something else than arrays")
    return arrays


def _ours(content: bytearray) -> Entry:
    length_at = len(content) - len(_MARK) - _LENGTH_BYTES
    checksum_at = length_at - _CHECKSUM_BYTES
    if checksum_at < 0 or content[checksum_at:length_at] != _checksum(content[:checksum_at]).encode():
        raise UnusableEntryError("damaged: the checksum differs")
    try:
        description = parse_json(content[checksum_at - int(content[length_at : -len(_MARK)], 16) : checksum_at])
        settings = description["settings"]
        for name in ("bucket", "resized", "origin"):
            settings[name] = tuple(settings[name])
        arrays = {name: _array(content, *where) for name, where in description["arrays"].items()}
        for name in arrays.keys() - {"alpha_mask"}:
            _sample(arrays[name])
        width, height = _image_size(description["original_size"])
        return Entry(
            mean=arrays["latents"],
            std=arrays["latents_std"],
            mirrored=(
                (arrays["latents_flipped"], arrays["latents_flipped_std"]) if "latents_flipped" in arrays else None
            ),
            mask=arrays.get("alpha_mask"),
            original_size=(width, height),
            settings=Settings(**settings),
            source=Source(**description["source"]),
        )
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UnusableEntryError("damaged: its description cannot be read") from error


def _image_size(sides: Sequence[Any]) -> Size:
    width, height = (int(side) for side in sides)
    if not (0 < width <= _LONGEST_SIDE and 0 < height <= _LONGEST_SIDE):
        raise ValueError("no size of an image")
    return width, height


def _array(content: bytearray, position: int, shape: Sequence[int]) -> Latents:
    return np.frombuffer(content, np.float32, math.prod(shape), position).reshape(shape)


def _old(arrays: Mapping[str, NDArray[Any]], path: Path) -> Entry:
    """The entry in a file of the older kind, with the mirrored latents from the file beside it."""
    latents = _sample(arrays[_OLD_ARRAY])
    mirrored: Latents | None = None
    beside = path.with_name(f"{path.stem}{_OLD_MIRRORED}{path.suffix}")
    # Beside an image of that name the file holds its own latents.
    if not any(beside.with_suffix(suffix).exists() for suffix in IMAGE_SUFFIXES):
        try:
            pair = _unpacked(beside.read_bytes(), beside.name)
        except FileNotFoundError:
            pair = {}
        except OSError as error:
            raise UnusableEntryError(f"{beside.name} beside it cannot be read: {error.strerror or error}") from error
        if pair and _OLD_ARRAY not in pair:
            raise UnusableEntryError(f"damaged: {beside.name} beside it holds something else")
        mirrored = _sample(pair[_OLD_ARRAY]) if pair else None
    return _of_samples(latents, mirrored, original_size=None, mask=None)


def _foreign(arrays: Mapping[str, NDArray[Any]]) -> Entry:
    missing = [name for name in ("latents", "original_size", "crop_ltrb") if name not in arrays]
    if missing:
        raise UnusableEntryError(f"not a file of latents: no {', '.join(missing)}")
    try:
        size = _image_size(arrays["original_size"].ravel().tolist())
    except (ValueError, TypeError, OverflowError) as error:
        raise UnusableEntryError("not a file of latents: original_size is no width and height") from error
    latents, flipped = _sample(arrays["latents"]), arrays.get("latents_flipped")
    mirrored = None if flipped is None else _sample(flipped)
    mask = arrays.get("alpha_mask")
    if mask is not None and (mask.dtype.kind != "f" or mask.ndim != 2 or not ((mask >= 0) & (mask <= 1)).all()):
        raise UnusableEntryError("not a file of latents: alpha_mask is no array of numbers from 0 to 1")
    return _of_samples(
        latents,
        mirrored,
        original_size=size,
        mask=None if mask is None else mask.astype(np.float32),
    )


def _of_samples(latents: Latents, mirrored: Latents | None, *, original_size: Size | None, mask: Mask | None) -> Entry:
    if mirrored is not None and mirrored.shape != latents.shape:
        raise UnusableEntryError("not a file of latents: the mirrored ones have another size")
    return Entry(
        mean=latents,
        std=np.zeros_like(latents),
        mirrored=None if mirrored is None else (mirrored, np.zeros_like(mirrored)),
        original_size=original_size,
        mask=mask,
    )


def _sample(values: NDArray[Any]) -> Latents:
    if values.ndim != 3 or values.dtype.kind != "f" or 0 in values.shape:
        raise UnusableEntryError("not a file of latents: not an array (channels, height, width)")
    sample: Latents = values.astype(np.float32)
    if not np.isfinite(sample).all():
        raise UnusableEntryError("holds values that are not finite")
    return sample


def _checksum(content: bytes | bytearray) -> str:
    return _digest(content, size=_CHECKSUM_BYTES // 2)


def _digest(content: bytes | bytearray, *, size: int) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()
