"""SHA-256 of whole files, computed on all cores and remembered while a file keeps its size and time of change."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from library.data.index import Stamp, Table, is_settled, read_table, stamp_of, write_table
from library.files import sha256_of_file

_KIND: Final = "sha256"
_WORTH_SHOWING: Final = 1_000_000_000
"""Bytes from which on reading takes long enough to be shown."""

_WORTH_KEEPING: Final = 64_000_000
"""Bytes of a folder's files from which on their hashes are remembered: fewer are read in an instant."""


def content_hashes(paths: Iterable[Path], *, progress: bool = False) -> dict[Path, str]:
    """SHA-256 of each file in hexadecimal; "" for one that cannot be read, of which others will tell.

    Args:
        paths: The files.
        progress: Show a bar where somebody looks and it takes a while.
    """
    began = time.time_ns()
    stamps = {path: stamp for path in dict.fromkeys(paths) if (stamp := _stamp(path)) is not None}
    folders: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in stamps:
        folders[path.parent].append(path)
    kept = {folder: files for folder, files in folders.items() if sum(stamps[p][0] for p in files) >= _WORTH_KEEPING}
    old = {folder: _remembered(folder) for folder in kept}
    known = {
        path: row[1]
        for folder, files in kept.items()
        for path in files
        if (row := old[folder].get(path.name)) is not None and row[0] == stamps[path]
    }
    missing = [path for path in stamps if path not in known]
    fresh = _computed(missing, progress=progress and sum(stamps[path][0] for path in missing) >= _WORTH_SHOWING)
    for folder, files in kept.items():
        rows = {p.name: (stamps[p], fresh[p]) for p in files if fresh.get(p) and is_settled(stamps[p], began)}
        if rows:
            _remember(folder, old[folder] | rows)
    return {path: known.get(path) or fresh.get(path, "") for path in paths}


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp_of(path.stat())
    except OSError:
        return None


def _computed(paths: list[Path], *, progress: bool) -> dict[Path, str]:
    # Hashing and reading work outside Python's lock, so threads do.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        # No bar where nobody looks: None asks whether the error output is a terminal.
        found = tqdm(
            pool.map(_hash, paths),
            total=len(paths),
            desc="hashing inputs",
            unit="file",
            disable=None if progress else True,
        )
        return dict(zip(paths, found, strict=True))


def _hash(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError:
        return ""


def _remembered(folder: Path) -> dict[str, tuple[Stamp, str]]:
    table = read_table(folder, _KIND, numbers=["hashes"])
    if table is None:
        return {}
    hashes = [value.decode() for value in table.numbers["hashes"].tolist()]
    return dict(zip(table.names, zip(table.stamps, hashes, strict=True), strict=True))


def _remember(folder: Path, rows: Mapping[str, tuple[Stamp, str]]) -> None:
    """Keep the hashes of the files of ``folder`` that are still there."""
    there: set[str] = set()
    with suppress(OSError):
        there = set(os.listdir(folder))
    kept = {name: row for name, row in rows.items() if name in there}
    hashes = np.array([value.encode() for _, value in kept.values()], dtype="S64")
    stamps = [stamp for stamp, _ in kept.values()]
    write_table(folder, _KIND, Table(names=list(kept), stamps=stamps, numbers={"hashes": hashes}))
