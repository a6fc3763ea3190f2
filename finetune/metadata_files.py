"""Metadata files as the tools change them: every field is kept, nothing is lost, and every change is told.

Reading is strict (:func:`library.data.metadata.read_metadata` says what is wrong, with the line); writing is whole or
not at all, indented by two, with letters beyond ASCII escaped, which every program reads.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from library.data.findings import warnings_of
from library.data.metadata import is_json_lines, read_metadata
from library.errors import UserError
from library.files import sweep, write_text
from library.options import near_remedy
from library.wording import named

log = logging.getLogger(__name__)

Metadata: TypeAlias = dict[str, dict[str, Any]]
"""What is said of each image, by its key, in the order of the file."""

_LINES: Final = ".jsonl"
_KEY: Final = "image_path"
_MOST_NAMED: Final = 3


def read_entries(path: Path) -> Metadata:
    """Every entry of a metadata file with all its fields.

    Raises:
        UserError: The file is missing, broken or of another shape.
    """
    if not path.is_file():
        what = f"'{path}' is a folder, not a metadata file" if path.is_dir() else f"metadata file not found: '{path}'"
        raise UserError(what, where=str(path), remedy="Give a .json file." if path.is_dir() else near_remedy(path))
    _, findings = read_metadata(path)
    for finding in warnings_of(findings):
        log.warning("%s", finding)
    text = path.read_bytes().decode("utf-8-sig")
    if not is_json_lines(path, text):
        return dict(json.loads(text))
    objects = [json.loads(line) for line in text.split("\n") if line.strip()]
    metadata: Metadata = {}
    for entry in objects:
        key = entry.pop(_KEY)
        if key in metadata:
            log.warning("%s: '%s' is given twice, and the last one counts", path, key)
        metadata[key] = entry
    return metadata


def write_entries(path: Path, metadata: Metadata) -> None:
    """Write a metadata file, whole or not at all; with the suffix ``.jsonl`` one object a line.

    Raises:
        UserError: It cannot be written; what was there stays.
    """
    check_writable(path)
    sweep(path.parent, lambda name: name == path.name)
    if path.suffix.lower() == _LINES:
        lines = (json.dumps({_KEY: key, **entry}) for key, entry in metadata.items())
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        write_text(path, json.dumps(metadata, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Refuse a name that cannot be written to, before any work is done.

    Raises:
        UserError: A folder has the name, or the file or its folder is write-protected.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder", where=str(path), remedy="Give the name of a file, such as meta.json.")
    place = path if path.exists() else next((above for above in path.parents if above.exists()), Path("."))
    if not os.access(place, os.W_OK) or (place != path and not place.is_dir()):
        raise UserError(
            f"cannot write {path.name}: '{place}' is not a place that may be written to",
            where=str(path),
            remedy="Choose another file, or lift the write protection; nothing was changed.",
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One field of one entry that is not what it was.

    Attributes:
        key: The entry.
        field: Its field.
        before: The old value; None where there was none.
        after: The new value.
    """

    key: str
    field: str
    before: object
    after: object

    def __str__(self) -> str:
        shown = json.dumps(self.after, ensure_ascii=False)
        if self.before is None:
            return f"+ {self.key}  {self.field}: {shown}"
        return f"~ {self.key}  {self.field}: {json.dumps(self.before, ensure_ascii=False)} -> {shown}"


def changes(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Iterator[Change]:
    """What differs in ``after``, which lacks nothing that ``before`` has."""
    for key, entry in after.items():
        old = before.get(key, {})
        for name, value in entry.items():
            if name not in old or old[name] != value:
                yield Change(key, name, old.get(name), value)


def store(path: Path, before: Metadata, after: Metadata, *, source: Path | None, dry_run: bool) -> None:
    """Write ``after`` and say what is new; with ``dry_run`` show every change instead.

    Args:
        path: The file to write.
        before: What was read.
        after: What it became.
        source: Where ``before`` came from; None where there was nothing.
        dry_run: Write nothing.

    Raises:
        UserError: The file cannot be written, or it exists and is no metadata file.
    """
    found = list(changes(before, after))
    if dry_run:
        print("\n".join(map(str, found)) or "nothing would change")
    _tell(before, after, found)
    if (present := entries_to_replace(path, source=source)) is not None:
        _tell_replaced(path, present, after)
    if dry_run:
        log.info("dry run: %s is not written", path)
        return
    write_entries(path, after)
    log.info("wrote %s (%d entries)", path, len(after))


def _tell(before: Metadata, after: Metadata, found: Sequence[Change]) -> None:
    added = [key for key in after if key not in before]
    log.info("%d entries: %d are new, %d were there", len(after), len(added), len(before))
    for name, count in sorted(Counter(change.field for change in found if change.before is None).items()):
        log.info("%s added to %d entries", name, count)
    replaced = [change for change in found if change.before is not None]
    for name, count in sorted(Counter(change.field for change in replaced).items()):
        keys = [change.key for change in replaced if change.field == name]
        log.warning("%s changed in %d entries: %s", name, count, quoted(keys))


def entries_to_replace(path: Path, *, source: Path | None) -> Metadata | None:
    """What an earlier file of the name ``path`` holds; None where there is none, or it is the ``source`` itself.

    Raises:
        UserError: It is no metadata file, and so not to be replaced.
    """
    if not path.exists() or (source is not None and path.samefile(source)):
        return None
    try:
        return read_entries(path)
    except UserError as error:
        raise UserError(
            f"{path.name} exists and is no metadata file, so it is not replaced",
            where=str(path),
            remedy=f"Choose another name, or remove the file ({error.problems[0].what}).",
        ) from error


def _tell_replaced(path: Path, present: Metadata, after: Metadata) -> None:
    """Say what is lost with an earlier file of the name."""
    lost = [key for key in present if key not in after]
    log.warning("%s exists and is replaced; %d of its %d entries stay", path, len(present) - len(lost), len(present))
    if lost:
        log.warning("no longer in it: %s", quoted(lost))


def quoted(names: Sequence[str]) -> str:
    """The first few of ``names`` in quotation marks, and how many more there are."""
    return named([f"'{name}'" for name in names], _MOST_NAMED)
