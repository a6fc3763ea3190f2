"""What the content of image files tells: read by decoding them, on all cores, and remembered between runs."""

import hashlib
import io
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from tqdm import tqdm

from library.data.findings import Finding, error
from library.data.images import UNREADABLE, orientation
from library.data.index import Stamp, Table, is_settled, read_table, stamp_of, write_table
from library.data.latent_files import is_latent_file
from library.data.records import ImageRecord

_HASH_SIDE: Final = 8
_WORTH_KEEPING: Final = 16_000_000
"""Pixels of a folder from which on its facts are remembered: fewer are decoded in an instant."""

_SAME_COLOUR: Final = 2
"""Levels by which lossy formats make pixels of one colour differ."""

_AHEAD: Final = 4
"""Images that wait for each thread."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the content of an image file tells.

    Attributes:
        digest: Of its bytes.
        look: Perceptual hash of 64 bits: whether each pixel of a 9 x 8 grey image is brighter than its right neighbour.
        is_blank: All pixels have one colour, or as good as.
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


@dataclass(frozen=True, slots=True)
class Damage:
    """Why an image cannot be decoded.

    Attributes:
        what: What the decoder says.
        is_lasting: It lies in the file itself, not in how it was reached.
    """

    what: str
    is_lasting: bool = True


def read_facts(records: Iterable[ImageRecord]) -> tuple[dict[Path, FileFacts], list[Finding]]:
    """The facts of every image of ``records``, and those that cannot be decoded.

    Images that have not changed since an earlier check are not decoded again. What was found out is kept even where
    somebody stops the check.
    """
    images = {record.path: record.size for record in records if not is_latent_file(record.name)}
    began = time.time_ns()
    stamps = {path: stamp_of(status) for path in images if (status := _status(path)) is not None}
    folders: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in images:
        folders[path.parent].append(path)
    old = {folder: _remembered(folder) for folder in folders}
    known: dict[Path, FileFacts | Damage] = {}
    for folder, paths in folders.items():
        for path in paths:
            row = old[folder].get(path.name)
            if row is not None and row[0] == stamps.get(path):
                known[path] = row[1]
    fresh: dict[Path, FileFacts | Damage] = {}
    try:
        for path, found in _decoded([path for path in images if path not in known]):
            fresh[path] = found
    finally:
        lasting = {path for path, found in fresh.items() if isinstance(found, FileFacts) or found.is_lasting}
        settled = {path for path in lasting if path in stamps and is_settled(stamps[path], began)}
        for folder, paths in folders.items():
            rows = {path.name: (stamps[path], fresh[path]) for path in paths if path in settled}
            if rows and sum(images[path][0] * images[path][1] for path in paths) >= _WORTH_KEEPING:
                _remember(folder, old[folder] | rows)
    all_found = known | fresh
    facts = {path: found for path in images if isinstance(found := all_found[path], FileFacts)}
    return facts, [_finding(path, found) for path in images if isinstance(found := all_found[path], Damage)]


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _finding(path: Path, damage: Damage) -> Finding:
    remedy = "Replace the file with a whole copy, or remove it."
    return error(f"the image cannot be decoded: {damage.what}", str(path), remedy)


def _decoded(paths: Sequence[Path]) -> Iterator[tuple[Path, FileFacts | Damage]]:
    """What the content of each image tells, in order; the decoders work outside Python's lock, so threads do."""
    workers = os.cpu_count() or 1
    # No bar where nobody looks: None asks whether the error output is a terminal.
    with tqdm(total=len(paths), desc="checking images", unit="image", disable=None) as bar:
        pool = ThreadPoolExecutor(workers)
        try:
            rest = iter(paths)
            # Never more at once than the threads need, so that a stop does not wait for all others.
            waiting = [(path, pool.submit(_facts_or_damage, path)) for path in islice(rest, workers * _AHEAD)]
            while waiting:
                path, future = waiting.pop(0)
                yield path, future.result()
                bar.update()
                waiting.extend((path, pool.submit(_facts_or_damage, path)) for path in islice(rest, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _facts_or_damage(path: Path) -> FileFacts | Damage:
    try:
        return _facts_of(path)
    except UNREADABLE as problem:
        # Decoders give no error number; the system does.
        is_lasting = getattr(problem, "errno", None) is None
        return Damage(str(problem) or type(problem).__name__, is_lasting)


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
        is_blank=all(high - low <= _SAME_COLOUR for low, high in lows_and_highs),  # type: ignore[misc]
        is_transparent=is_transparent,
        is_turned=turned,
        frames=int(frames),
    )


def _remembered(folder: Path) -> dict[str, tuple[Stamp, FileFacts | Damage]]:
    names = ("digests", "looks", "flags", "frames")
    table = read_table(folder, "facts", numbers=names, texts=["damage"])
    if table is None:
        return {}
    columns = (table.numbers[name].tolist() for name in names)
    rows: dict[str, tuple[Stamp, FileFacts | Damage]] = {}
    for name, stamp, what, digest, look, flags, frames in zip(
        table.names, table.stamps, table.texts["damage"], *columns, strict=True
    ):
        blank, transparent, turned = (bool(flags & bit) for bit in (1, 2, 4))
        facts = FileFacts(bytes.fromhex(digest.decode()), look, blank, transparent, turned, frames)
        rows[name] = (stamp, Damage(what) if what else facts)
    return rows


def _remember(folder: Path, rows: Mapping[str, tuple[Stamp, FileFacts | Damage]]) -> None:
    """Keep the facts of the files of ``folder`` that are still there."""
    there: set[str] = set()
    with suppress(OSError):
        there = set(os.listdir(folder))
    kept = {name: row for name, row in rows.items() if name in there}
    nothing = FileFacts(b"", 0, False, False, False, 0)
    facts = [found if isinstance(found, FileFacts) else nothing for _, found in kept.values()]
    table = Table(
        names=list(kept),
        stamps=[stamp for stamp, _ in kept.values()],
        numbers={
            # As text: NumPy would cut zeros off the end of bytes.
            "digests": np.array([fact.digest.hex().encode() for fact in facts], dtype="S32"),
            "looks": np.array([fact.look for fact in facts], dtype=np.uint64),
            "flags": np.array(
                [fact.is_blank | fact.is_transparent << 1 | fact.is_turned << 2 for fact in facts], dtype=np.uint8
            ),
            "frames": np.array([fact.frames for fact in facts], dtype=np.int64),
        },
        texts={
            "damage": [found.what.replace("\0", " ") if isinstance(found, Damage) else "" for _, found in kept.values()]
        },
    )
    write_table(folder, "facts", table)
