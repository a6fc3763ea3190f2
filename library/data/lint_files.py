"""Mistakes that only a look at every pixel shows: damage, copies, and what decoding will change.

The facts come from decoding every image, so this is for checks without training.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from library.data.file_facts import FileFacts, read_facts
from library.data.findings import Finding, warning
from library.data.records import ImageRecord
from library.data.spec import SubsetSpec
from library.wording import named

__all__ = ["lint_copies", "lint_files", "near_pairs", "read_facts"]

_MOST_NAMED: Final = 5
_LOOK_BITS: Final = 64
_NEAR_BITS: Final = 6
"""Two images are near-duplicates when their hashes of 64 bits differ in at most so many."""

_BANDS: Final = _NEAR_BITS + 1
_EDGES: Final = [_LOOK_BITS * band // _BANDS for band in range(_BANDS + 1)]


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
        alike = [f"{first.name} and {second.name}" for first, second in pairs]
        yield warning(
            f"{len(pairs)} pairs of images look the same: {named(alike, _MOST_NAMED, between='; ')}",
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
    return named([f"{path.parent.name}/{path.name}" for path in paths], _MOST_NAMED)


def _named(records: Sequence[ImageRecord]) -> str:
    return named([record.name for record in records], _MOST_NAMED)
