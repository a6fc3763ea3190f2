"""Names that stand for files and folders in a manifest, so that it holds no path and can be repeated elsewhere.

A path becomes ``map:NAME`` with its last part as the name. What the names stood for is listed, and a path that was
written relative to the current folder is kept: it means the same from there.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from library.documents import home_expanded
from library.scrubbing import current_folder, last_part

MARK: Final = "map:"


@dataclass(slots=True)
class Placeholder:
    """What a name stands for.

    Attributes:
        name: The name, without the mark.
        place: The file or folder.
        uses: What it is used as: options, or keys of the dataset file.
        kept: The path as it was written, where it may be told.
    """

    name: str
    place: Path
    uses: list[str] = field(default_factory=list)
    kept: str | None = None


class Placeholders:
    """Gives names to paths, each file or folder one."""

    def __init__(self) -> None:
        self._by_place: dict[str, Placeholder] = {}

    def of(self, written: str, use: str, *, beside: Path | None = None) -> str:
        """The text that stands for a path.

        Args:
            written: The path as it was given.
            use: What it is given as.
            beside: A folder in which it lies unless it is found from the current one.
        """
        place = home_expanded(Path(written))
        if beside is not None and not place.exists() and (beside / place).exists():
            place = beside / place
        found = self._by_place.setdefault(os.path.abspath(place), Placeholder(self._free(last_part(written)), place))
        if use not in found.uses:
            found.uses.append(use)
        if _may_be_told(place):
            found.kept = place.as_posix()
        return MARK + found.name

    def _free(self, name: str) -> str:
        name = name or "folder"
        taken = {one.name for one in self._by_place.values()}
        return next(one for one in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if one not in taken)

    def __iter__(self) -> Any:
        """Every name, in the order in which they were given."""
        return iter(self._by_place.values())


def _may_be_told(place: Path) -> bool:
    """Whether a path says nothing of this machine: relative, and below a folder that does not hold homes."""
    return not place.is_absolute() and ".." not in place.parts and current_folder() is not None


def filled_in(value: Any, places: Mapping[str, str]) -> Any:
    """``value``, a JSON value, with every placeholder replaced by its place; unknown ones stay."""
    if isinstance(value, dict):
        return {key: filled_in(one, places) for key, one in value.items()}
    if isinstance(value, list):
        return [filled_in(one, places) for one in value]
    if not isinstance(value, str):
        return value
    key, equals, rest = value.partition("=")
    if equals and key.isidentifier():
        return f"{key}={filled_in(rest, places)}"
    name = value.removeprefix(MARK)
    return places.get(name, value) if value.startswith(MARK) else value
