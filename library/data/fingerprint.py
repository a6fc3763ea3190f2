"""What a training set is, in numbers: by it a run tells later whether the same images and captions are there again."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from library.data.content_hashes import content_hashes
from library.data.records import ImageRecord
from library.data.spec import DataSpec
from library.data.validation import relative_name

MOST_LISTED: Final = 10_000
"""Images of a subset up to which each is listed; of more there is one digest for all."""

_DIGITS: Final = 16
_PARTS: Final = ("image", "caption", "mask")


def data_fingerprint(spec: DataSpec, records: Sequence[ImageRecord], *, progress: bool = False) -> dict[str, Any]:
    """The fingerprint of a training set, ready for JSON: no paths but those of images below their folder.

    Of every image count its bytes, its caption, the bytes of its mask, its repeats, and where the data set puts it. All
    files are read, but for those whose hash is remembered.

    Args:
        spec: The data sets.
        records: Their images.
        progress: Show a bar where somebody looks.
    """
    masks = [record.mask for record in records if record.mask is not None]
    hashes = content_hashes([*(record.path for record in records), *masks], progress=progress)
    members: defaultdict[tuple[int, int], list[ImageRecord]] = defaultdict(list)
    for record in records:
        members[record.dataset, record.subset].append(record)
    subsets = [
        _subset(spec, place, members[place], hashes)
        for place in ((d, s) for d, dataset in enumerate(spec.datasets) for s, _ in enumerate(dataset.subsets))
    ]
    return {
        "images": len(records),
        "digest": _digest(subset["digest"] for subset in subsets),
        "subsets": subsets,
    }


def _subset(
    spec: DataSpec, place: tuple[int, int], records: Sequence[ImageRecord], hashes: Mapping[Path, str]
) -> dict[str, Any]:
    subset = spec.datasets[place[0]].subsets[place[1]]
    listed: dict[str, str] = {}
    facts = []
    for record in records:
        name = relative_name(record, subset)
        # A file outside its folder has a name that tells where.
        name = record.name if name.startswith("../") else name
        parts = [hashes[record.path], _digest([record.caption, record.tags or ""])]
        if record.mask is not None:
            parts.append(hashes[record.mask])
        listed[name] = " ".join(part[:_DIGITS] for part in parts)
        facts.append(repr((name, *parts, record.repeats, record.is_reg, record.bucket, record.size)))
    found = {
        "dataset": place[0] + 1,
        "subset": place[1] + 1,
        "folder": subset.name,
        "images": len(records),
        "digest": _digest(facts),
    }
    return {**found, "files": listed} if len(records) <= MOST_LISTED else found


def _digest(texts: Iterator[str] | Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        # A length keeps two texts from looking like one.
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, by image as far as they list images; empty where they are the same."""
    if before["digest"] == now["digest"]:
        return []
    old, new = ({(one["dataset"], one["subset"]): one for one in found["subsets"]} for found in (before, now))
    if old.keys() != new.keys():
        return ["the data sets have other subsets"]
    return [line for place in old for line in _subset_differences(old[place], new[place])]


def _subset_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before["digest"] == now["digest"]:
        return []
    folder = now["folder"]
    old, new = before.get("files"), now.get("files")
    if old is None or new is None:
        count = "" if before["images"] == now["images"] else f" ({before['images']} images, now {now['images']})"
        return [f"{folder}: some images or captions are not the same{count}"]
    found = [f"{folder}/{name}: is not there" for name in old if name not in new]
    found += [f"{folder}/{name}: was not there" for name in new if name not in old]
    for name in old.keys() & new.keys():
        found += [f"{folder}/{name}: another {part}" for part in _changed(old[name], new[name])]
    return sorted(found) or [f"{folder}: other repeats, sizes or uses of the images"]


def _changed(before: str, now: str) -> list[str]:
    old, new = ([*parts.split(), *[""] * len(_PARTS)][: len(_PARTS)] for parts in (before, now))
    return [part for part, one, other in zip(_PARTS, old, new, strict=True) if one != other]
