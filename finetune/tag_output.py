"""Where tags go: a text file beside each image, or one metadata file."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Final, Protocol

from finetune.caption_files import text_file, to_write
from finetune.metadata_files import Metadata, check_writable, read_entries, write_entries
from finetune.processes import Processes
from library.data.caption_files import UnreadableCaptionError, read_text
from library.data.spec import Size
from library.errors import UserError
from library.files import write_text

_KEPT_EVERY: Final = 30.0
"""Seconds after which the results so far are written, so that a crash costs no more."""

log = logging.getLogger(__name__)


class TagOutput(Protocol):
    """Where the tags of images go."""

    def pending(self, images: Sequence[Path]) -> list[Path]:
        """Those of ``images`` that are to be tagged; says what becomes of results that are there."""
        ...

    def write(self, image: Path, tags: Sequence[str], size: Size) -> None:
        """Keep the ``tags`` of an image with the displayed ``size``."""
        ...

    def keep(self) -> None:
        """Keep what there is when the work is stopped."""
        ...

    def finish(self, images: Sequence[Path], processes: Processes) -> None:
        """Put what all processes have done in its place; ``images`` gives the order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Separator:
    """What separates tags.

    Attributes:
        text: As it is written.
    """

    text: str

    def split(self, line: str) -> list[str]:
        """The tags in ``line``."""
        return [part.strip() for part in line.split(self.text.strip()) if part.strip()]

    def extended(self, line: str, tags: Sequence[str]) -> str:
        """The tags in ``line``, and those of ``tags`` that are new."""
        old = self.split(line)
        return self.text.join([*old, *(tag for tag in tags if tag not in old)])


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFiles:
    """A text file beside each image.

    Attributes:
        extension: Its suffix.
        separator: Between tags.
        appends: Tags that are there stay in front.
        skips_existing: Images that have a text file are left out.
    """

    extension: str
    separator: Separator
    appends: bool
    skips_existing: bool

    def pending(self, images: Sequence[Path]) -> list[Path]:
        """See :class:`TagOutput`."""
        return to_write(images, self.extension, skip_existing=self.skips_existing, extends=self.appends)

    def write(self, image: Path, tags: Sequence[str], size: Size) -> None:
        """See :class:`TagOutput`."""
        path = text_file(image, self.extension)
        old = _text_in(path) if self.appends and path.exists() else ""
        write_text(path, self.separator.extended(old, tags) + "\n")

    def keep(self) -> None:
        """See :class:`TagOutput`; every file is in its place already."""

    def finish(self, images: Sequence[Path], processes: Processes) -> None:
        """See :class:`TagOutput`; every file is in its place already."""


def _text_in(path: Path) -> str:
    try:
        return " ".join(read_text(path).splitlines())
    except (UnreadableCaptionError, OSError) as error:
        raise UserError(
            f"cannot add tags to {path.name}: {error}", where=str(path), remedy="Save it as UTF-8 text, or remove it."
        ) from error


class MetadataFile:
    """One metadata file for all images.

    Until the work is done, results are kept in a file beside it (``tags.part0.json``); only a whole result replaces
    what was there.
    """

    def __init__(
        self, path: Path, *, separator: Separator, appends: bool, skips_existing: bool, processes: Processes
    ) -> None:
        """Prepare to write ``path``; see :class:`TextFiles` for the rest."""
        self._path = path
        self._separator = separator
        self._appends = appends
        self._skips_existing = skips_existing
        self._part = _part(path, processes.rank)
        self._field = "caption" if path.suffix.lower() == ".jsonl" else "tags"
        self._before: Metadata = {}
        self._new: Metadata = {}
        self._kept = time.monotonic()

    def pending(self, images: Sequence[Path]) -> list[Path]:
        """See :class:`TagOutput`."""
        check_writable(self._path)
        keeps = self._appends or self._skips_existing
        if self._path.exists():
            known = read_entries(self._path)
            if keeps:
                self._before = known
            log.warning("%s has %d entries and is %s", self._path, len(known), "extended" if keeps else "replaced")
        if not self._skips_existing:
            return list(images)
        for part in _parts(self._path):
            self._before |= read_entries(part)
        pending = [image for image in images if self._field not in self._before.get(str(image), {})]
        log.info("%d of %d images have an entry already and are left out", len(images) - len(pending), len(images))
        return pending

    def write(self, image: Path, tags: Sequence[str], size: Size) -> None:
        """See :class:`TagOutput`."""
        old = self._before.get(str(image), {})
        line = self._separator.extended(str(old.get(self._field, "")), tags) if self._appends else None
        self._new[str(image)] = {
            **old,
            self._field: self._separator.text.join(tags) if line is None else line,
            "image_size": list(size),
        }
        if time.monotonic() - self._kept >= _KEPT_EVERY:
            self.keep()

    def keep(self) -> None:
        """See :class:`TagOutput`."""
        self._kept = time.monotonic()
        own = read_entries(self._part) if self._skips_existing and self._part.exists() else {}
        if self._new:
            write_entries(self._part, own | self._new)

    def finish(self, images: Sequence[Path], processes: Processes) -> None:
        """See :class:`TagOutput`."""
        if processes.world > 1:
            if not self._new and not self._skips_existing:
                # What an earlier run has left, which was not to be continued.
                self._part.unlink(missing_ok=True)
            self.keep()
            processes.wait()
        if not processes.is_main:
            processes.wait()
            return
        done: Metadata = dict(self._before)
        for rank in range(1, processes.world):
            if _part(self._path, rank).exists():
                done |= read_entries(_part(self._path, rank))
        done |= self._new
        write_entries(self._path, _in_order(done, [str(image) for image in images]))
        for part in _parts(self._path):
            with suppress(OSError):
                part.unlink()
        processes.wait()


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.part{rank}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    """The kept results of every process, of an earlier run included."""
    return sorted(path.parent.glob(f"{escape(path.stem)}.part[0-9]*{path.suffix}"))


def _in_order(entries: Mapping[str, Any], names: Sequence[str]) -> Metadata:
    """``entries`` with those of ``names`` last, in that order."""
    last = [name for name in names if name in entries]
    known = set(last)
    return {name: entries[name] for name in [*(name for name in entries if name not in known), *last]}
