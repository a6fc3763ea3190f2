"""What is remembered of the files of a folder between runs, so that they are not read again while they stay the same.

A table holds one row a file: its name, its size in bytes and its time of change, and what was read from it. The tables
lie in the user's cache folder, never beside the images; a table is called by a digest of its folder's place, and holds
names alone. They can be deleted at any time.
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from library.errors import UserError
from library.files import is_temporary, written_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[int, int]
"""Size of a file in bytes, and its time of change in ns since 1970: while both are the same, the file is."""

_VERSION: Final = 1
_PROGRAM: Final = "stable-diffusion-training"
_SETTLED: Final = 2_000_000_000
"""ns: a file changed later than this before it was read may change again without a new stamp (FAT counts 2 s)."""

_KEPT: Final = 180 * 86400
"""Seconds after which a table that nobody used is deleted."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a table; everything is in the same order.

    Attributes:
        names: File names, each once.
        stamps: Their stamps.
        numbers: What was read from them, arrays of as many rows.
        texts: What was read from them, texts without NUL.
    """

    names: Sequence[str]
    stamps: Sequence[Stamp]
    numbers: "Mapping[str, NDArray[Any]]" = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def cache_folder() -> Path:
    """The folder of the tables: below ``$XDG_CACHE_HOME``, or where the system keeps caches."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        base = Path(chosen)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / _PROGRAM / "folders"


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns


def is_settled(stamp: Stamp, read: int) -> bool:
    """Whether a file with this stamp, read at ``read`` (ns since 1970), is sure to get another one when it changes."""
    return stamp[1] < read - _SETTLED


def read_table(folder: Path, kind: str, *, numbers: Collection[str] = (), texts: Collection[str] = ()) -> Table | None:
    """The table of ``folder``; None where there is none, or none that can be used.

    Args:
        folder: The folder that it is about.
        kind: What it is for; part of its name.
        numbers: The columns of numbers that it must have.
        texts: The columns of text that it must have.
    """
    # Small folders have no table and do not wait for it.
    import numpy as np

    try:
        path = _place(folder, kind)
        with np.load(path, allow_pickle=False) as content:
            if int(content["version"]) != _VERSION:
                return None
            count = len(content["stamps"])
            table = Table(
                names=_texts_of(content["names"], count),
                stamps=list(zip(*content["stamps"].T.tolist(), strict=True)),
                numbers={name: _rows_of(content[name], count) for name in numbers},
                texts={name: _texts_of(content[name], count) for name in texts},
            )
    except FileNotFoundError:
        return None
    except RuntimeError:  # there is no home folder
        return None
    except Exception as problem:  # whatever the bytes make the reader stumble over
        log.warning("what was remembered of the images of a folder is damaged, and is read anew: %s", problem)
        return None
    with suppress(OSError):
        # Its time tells when it was last of use.
        os.utime(path)
    return table


def _rows_of(column: "NDArray[Any]", count: int) -> "NDArray[Any]":
    if len(column) != count:
        raise ValueError("rows are missing")
    return column


def _texts_of(column: "NDArray[np.uint8]", count: int) -> list[str]:
    texts = column.tobytes().decode("utf-8", "surrogatepass").split("\0") if count else []
    if len(texts) != count:
        raise ValueError("texts are missing")
    return texts


def _column_of(texts: Sequence[str]) -> "NDArray[np.uint8]":
    import numpy as np

    # File names may hold halves of characters, which stand for bytes that are no text.
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogatepass"), dtype=np.uint8)


def write_table(folder: Path, kind: str, table: Table) -> None:
    """Remember ``table`` for the next run; where that cannot be done, the files will be read again.

    Of several processes the first alone writes.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    import numpy as np

    try:
        path = _place(folder, kind)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _delete_unused(path.parent)
        with written_whole(path) as temporary, temporary.open("wb") as file:
            columns = {
                "version": np.array(_VERSION),
                "names": _column_of(table.names),
                "stamps": np.array(table.stamps, dtype=np.int64).reshape(-1, 2),
                **table.numbers,
                **{name: _column_of(texts) for name, texts in table.texts.items()},
            }
            np.savez(file, allow_pickle=False, **columns)
    except (UserError, OSError, RuntimeError) as problem:
        log.info("what was read from a folder of images is not remembered for the next run: %s", problem)


def _place(folder: Path, kind: str) -> Path:
    """Where the table of a folder lies; :class:`RuntimeError` where the user has no home."""
    digest = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=16).hexdigest()
    return cache_folder() / f"{digest}-{kind}.npz"


def _delete_unused(tables: Path) -> None:
    """Delete the tables that were not used for long, and what killed processes left of new ones."""
    now = time.time()
    with os.scandir(tables) as entries:
        for entry in entries:
            age = 86400 if is_temporary(entry.name) else _KEPT
            # Other processes may be doing the same.
            with suppress(OSError):
                if entry.stat().st_mtime < now - age:
                    os.unlink(entry.path)
