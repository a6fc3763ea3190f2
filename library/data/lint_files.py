"""Mistakes that only a look at every pixel shows: damage, copies, and what decoding will change.

Every image is read and decoded once, so this is for checks without training.
"""

import hashlib
import io
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from tqdm import tqdm

from library.data.findings import Finding, error, warning
from library.data.images import orientation
from library.data.records import ImageRecord
from library.data.spec import SubsetSpec

_MOST_NAMED: Final = 5
_HASH_SIDE: Final = 8
_NEAR_BITS: Final = 6
"""Two images are near-duplicates when their hashes of 64 bits differ in at most so many."""

_BANDS: Final = _NEAR_BITS + 1
_EDGES: Final = [_HASH_SIDE * _HASH_SIDE * band // _BANDS for band in range(_BANDS + 1)]
_UNREADABLE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the content of an image file tells.

    Attributes:
        digest: Of its bytes.
        look: Perceptual hash of 64 bits: whether each pixel of a 9 x 8 grey image is brighter than its right neighbour.
        is_blank: All pixels have one colour.
        is_transparent: Some pixels are not opaque.
        is_turned: Its EXIF orientation is not upright.
        frames: Pictures in it.
    """

    digest: bytes
    look: int
    is_blank: bool
    is_transparent: bool
    is_turned: bool
    frames: int


def lint_files(subset: SubsetSpec, records: Sequence[ImageRecord], facts: Mapping[Path, FileFacts]) -> list[Finding]:
    """What is remarkable about the files of a subset; only those with facts are looked at."""
    known = [(record, facts[record.path]) for record in records if record.path in facts]
    kinds = (
        (
            [record for record, fact in known if fact.is_transparent and not subset.alpha_mask],
            "have transparent parts, which are trained as white",
            "Put the background that is meant behind them, or leave it so.",
        ),
        (
            [record for record, fact in known if fact.is_turned],
            "are stored turned or mirrored and are put upright by their EXIF orientation",
            "Nothing needs to be done; other programs may show or train them turned.",
        ),
        (
            [record for record, fact in known if fact.frames > 1],
            "are animations, of which only the first picture is used",
            "Save the pictures that are meant as images of their own.",
        ),
        (
            [record for record, fact in known if fact.is_blank],
            "show nothing but one colour",
            "Remove them, unless an empty image is meant.",
        ),
    )
    return [
        warning(
            f"{len(found)} of {len(records)} images in '{subset.name}' {what}: {_named(found)}", subset.where, remedy
        )
        for found, what, remedy in kinds
        if found
    ]


def read_facts(records: Iterable[ImageRecord]) -> tuple[dict[Path, FileFacts], list[Finding]]:
    """The facts of every image of ``records``, and those that cannot be decoded."""
    facts: dict[Path, FileFacts] = {}
    findings: list[Finding] = []
    # No bar where nobody looks: None asks whether the error output is a terminal.
    for path in tqdm(dict.fromkeys(record.path for record in records), desc="checking images", disable=None):
        try:
            facts[path] = _facts_of(path)
        except _UNREADABLE as problem:
            findings.append(
                error(
                    f"the image cannot be decoded: {problem or type(problem).__name__}",
                    str(path),
                    "Replace the file with a whole copy, or remove it.",
                )
            )
    return facts, findings


def _facts_of(path: Path) -> FileFacts:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        frames = getattr(image, "n_frames", 1)
        turned = orientation(image) != 1
        is_transparent = False
        if image.has_transparency_data:
            low = image.convert("RGBA").getchannel("A").getextrema()[0]
            is_transparent = float(low) < 255  # type: ignore[arg-type]
        grey = image.convert("L")
        lows_and_highs = image.convert("RGB").getextrema()
    small = np.asarray(grey.resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] < small[:, :-1]).ravel()
    return FileFacts(
        digest=hashlib.blake2b(content, digest_size=16).digest(),
        look=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        is_blank=all(low == high for low, high in lows_and_highs),  # type: ignore[misc]
        is_transparent=is_transparent,
        is_turned=turned,
        frames=int(frames),
    )


def lint_copies(records: Sequence[ImageRecord], facts: Mapping[Path, FileFacts], where: str) -> Iterator[Finding]:
    """Images of a data set that are the same file content, or look the same."""
    regularisation = {record.path: record.is_reg for record in records if record.path in facts}
    by_content: defaultdict[bytes, list[Path]] = defaultdict(list)
    for path in regularisation:
        by_content[facts[path].digest].append(path)
    copies = [paths for paths in by_content.values() if len(paths) > 1]
    for paths in copies[:_MOST_NAMED]:
        both = len({regularisation[path] for path in paths}) > 1
        also = ", for training and for regularisation" if both else ""
        yield warning(
            f"the same image is there {len(paths)} times{also}: {_names(paths)}",
            where,
            "Remove the copies; to weigh an image more, put it into a folder with more repeats.",
        )
    if len(copies) > _MOST_NAMED:
        rest = [paths[0] for paths in copies[_MOST_NAMED:]]
        yield warning(f"{len(rest)} more images have copies: {_names(rest)}", where, "Remove the copies.")
    yield from _lint_look_alikes([paths[0] for paths in by_content.values()], facts, where)


def _lint_look_alikes(paths: Sequence[Path], facts: Mapping[Path, FileFacts], where: str) -> Iterator[Finding]:
    """Different files that look the same: resized, recompressed, slightly changed."""
    pairs = near_pairs({path: facts[path].look for path in paths if not facts[path].is_blank})
    if pairs:
        shown = "; ".join(f"{first.name} and {second.name}" for first, second in pairs[:_MOST_NAMED])
        more = f" and {len(pairs) - _MOST_NAMED} more" if len(pairs) > _MOST_NAMED else ""
        yield warning(
            f"{len(pairs)} pairs of images look the same: {shown}{more}",
            where,
            "Keep the better one of each pair, unless both are meant.",
        )


def near_pairs(looks: Mapping[Path, int]) -> list[tuple[Path, Path]]:
    """The pairs whose hashes differ in few bits; of many that look the same, each is paired with the first."""
    # Two hashes that differ in at most six bits agree in at least one of seven bands.
    bands: defaultdict[tuple[int, int], list[Path]] = defaultdict(list)
    pairs: list[tuple[Path, Path]] = []
    for path, look in looks.items():
        keys = [(low, look >> low & (1 << high - low) - 1) for low, high in pairwise(_EDGES)]
        candidates = dict.fromkeys(other for key in keys for other in bands[key])
        twin = next((other for other in candidates if (looks[other] ^ look).bit_count() <= _NEAR_BITS), None)
        if twin is not None:
            pairs.append((twin, path))
            continue
        for key in keys:
            bands[key].append(path)
    return pairs


def _names(paths: Sequence[Path]) -> str:
    shown = [f"{path.parent.name}/{path.name}" for path in paths[:_MOST_NAMED]]
    return ", ".join(shown) + (f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else "")


def _named(records: Sequence[ImageRecord]) -> str:
    more = f" and {len(records) - _MOST_NAMED} more" if len(records) > _MOST_NAMED else ""
    return ", ".join(record.path.name for record in records[:_MOST_NAMED]) + more
