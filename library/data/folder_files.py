"""The files of one folder of images: listed once, their sizes and captions read only where they are not remembered."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from library.data.caption_files import UnreadableCaptionError, read_text
from library.data.image_headers import UnreadableImageError, size_of_many, without_size_warnings
from library.data.index import Stamp, Table, is_settled, read_table, stamp_of, write_table
from library.data.spec import Size

T = TypeVar("T")

_WORTH_KEEPING: Final = 256
"""Files of a folder from which on they are remembered: fewer are read in an instant."""

_SHOWN_FROM: Final = 2000
"""Files to be read from which on there is a progress bar."""


_ASKED_ONE_BY_ONE: Final = os.stat in os.supports_dir_fd
"""Whether a file is asked for quickest by its name in an open folder; elsewhere (Windows) the listing tells it all."""


class Listing:
    """The names of the files of one folder, and their stamps when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """List ``folder``; one that cannot be listed has no files."""
        self._folder = folder
        self._entries: dict[str, os.DirEntry[str] | None] = {}
        with suppress(OSError):
            if _ASKED_ONE_BY_ONE:
                self._entries = dict.fromkeys(os.listdir(folder))
            else:
                with os.scandir(folder) as entries:
                    self._entries = {entry.name: entry for entry in entries}

    @property
    def names(self) -> Set[str]:
        """The names of all files."""
        return self._entries.keys()

    def stamps(self, names: Iterable[str]) -> list[Stamp | None]:
        """The stamps of files, taken before they are read; None for a name without a file."""
        if not _ASKED_ONE_BY_ONE:
            entries = map(self._entries.get, names)
            return [None if entry is None else _stamp(entry.stat) for entry in entries]
        try:
            folder = os.open(self._folder, os.O_RDONLY)
        except OSError:
            return [None for _ in names]
        stamps: list[Stamp | None] = []
        try:
            for name in names:
                try:
                    status = os.stat(name, dir_fd=folder)
                except OSError:
                    stamps.append(None)
                else:
                    stamps.append((status.st_size, status.st_mtime_ns))
        finally:
            os.close(folder)
        return stamps


def _stamp(status: Callable[[], os.stat_result]) -> Stamp | None:
    try:
        return stamp_of(status())
    except OSError:
        return None


class FolderFiles:
    """The files of one folder, as they were when it was listed."""

    def __init__(self, folder: Path) -> None:
        """List ``folder``; one that cannot be listed has no files."""
        self._folder = folder
        self._listed = time.time_ns()
        self._listing = Listing(folder)
        self._sizes: dict[str, Size | UnreadableImageError] = {}
        self._texts: dict[str, str | Exception] = {}
        self._read: dict[str, Stamp | None] = {}
        self._old_sizes: dict[str, tuple[Stamp, Size]] | None = None
        self._old_texts: dict[str, tuple[Stamp, str]] | None = None

    @property
    def names(self) -> Set[str]:
        """The names of all files."""
        return self._listing.names

    def by_suffix(self) -> dict[str, list[str]]:
        """The names of the files that are not hidden by their suffix in small letters, with its dot, in no order."""
        # Many names have few suffixes, so each suffix is looked at once.
        found: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.names:
            found[name[name.rfind(".") :]].append(name)
        joint: dict[str, list[str]] = {}
        for suffix, names in found.items():
            if shown := [name for name in names if name[0] != "."]:
                joint.setdefault(suffix.lower(), []).extend(shown)
        return joint

    def sizes(self, names: Iterable[str]) -> Mapping[str, Size | UnreadableImageError]:
        """The displayed sizes of images, ``names`` among them, or why they cannot be read."""
        if self._old_sizes is None:
            self._old_sizes = self._remembered_sizes()
        new = [name for name in dict.fromkeys(names) if name not in self._sizes]
        with without_size_warnings():
            for name in self._unknown(new, self._old_sizes, self._sizes, "reading image sizes"):
                try:
                    self._sizes[name] = size_of_many(os.path.join(self._folder, name))
                except UnreadableImageError as problem:
                    self._sizes[name] = problem
        return self._sizes

    def texts(self, names: Iterable[str]) -> Mapping[str, str | Exception]:
        """What text files hold, ``names`` among them, or why they cannot be read."""
        if self._old_texts is None:
            self._old_texts = self._remembered_texts()
        new = [name for name in dict.fromkeys(names) if name not in self._texts]
        for name in self._unknown(new, self._old_texts, self._texts, "reading captions"):
            try:
                self._texts[name] = read_text(os.path.join(self._folder, name))
            except (UnreadableCaptionError, OSError) as problem:
                self._texts[name] = problem
        return self._texts

    def _unknown(
        self, names: Sequence[str], old: Mapping[str, tuple[Stamp, T]], found: MutableMapping[str, Any], what: str
    ) -> Iterator[str]:
        """The ``names`` whose files have changed since ``old``; of the others, ``found`` gets what is remembered."""
        unknown: dict[str, Stamp | None] = {}
        for name, stamp, known in zip(names, self._listing.stamps(names), map(old.get, names), strict=True):
            if known is not None and known[0] == stamp:
                found[name] = known[1]
            else:
                unknown[name] = stamp
        self._read |= unknown
        if len(unknown) < _SHOWN_FROM:
            yield from unknown
        else:
            from tqdm import tqdm

            # No bar where nobody looks: None asks whether the error output is a terminal.
            yield from tqdm(unknown, desc=what, unit="file", disable=None, leave=False)

    def remember(self) -> None:
        """Keep what was read for the next run."""
        sizes = self._merged(self._sizes, self._old_sizes)
        if sizes is not None:
            import numpy as np

            rows = np.array([size for _, size in sizes.values()], dtype=np.int32)
            self._write("sizes", sizes, numbers={"sizes": rows})
        texts = self._merged(self._texts, self._old_texts)
        if texts is not None:
            self._write("texts", texts, texts={"texts": [text for _, text in texts.values()]})

    def _write(self, kind: str, rows: Mapping[str, tuple[Stamp, object]], **columns: Any) -> None:
        stamps = [stamp for stamp, _ in rows.values()]
        write_table(self._folder, kind, Table(list(rows), stamps, **columns))

    def _merged(
        self, found: Mapping[str, T | Exception], old: Mapping[str, tuple[Stamp, T]] | None
    ) -> dict[str, tuple[Stamp, T]] | None:
        """What there is to remember of the folder; None where that is what is remembered, or little."""
        if old is None:
            return None
        new: dict[str, tuple[Stamp, T]] = {}
        for name, stamp in self._read.items():
            value = found.get(name)
            if value is None or stamp is None or isinstance(value, Exception):
                continue
            if is_settled(stamp, self._listed):
                new[name] = (stamp, value)
        if not new:
            return None
        merged = {name: row for name, row in old.items() if name in self.names} | new
        return merged if len(merged) >= _WORTH_KEEPING else None

    def _remembered_sizes(self) -> dict[str, tuple[Stamp, Size]]:
        table = read_table(self._folder, "sizes", numbers=["sizes"]) if self._is_large() else None
        if table is None:
            return {}
        # Equal sizes share one object.
        shared: dict[Size, Size] = {}
        sizes = [shared.setdefault(size, size) for size in zip(*table.numbers["sizes"].T.tolist(), strict=True)]
        return dict(zip(table.names, zip(table.stamps, sizes, strict=True), strict=True))

    def _remembered_texts(self) -> dict[str, tuple[Stamp, str]]:
        table = read_table(self._folder, "texts", texts=["texts"]) if self._is_large() else None
        return (
            {}
            if table is None
            else dict(zip(table.names, zip(table.stamps, table.texts["texts"], strict=True), strict=True))
        )

    def _is_large(self) -> bool:
        return len(self.names) >= _WORTH_KEEPING
