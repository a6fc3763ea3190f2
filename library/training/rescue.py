"""What becomes of a save that fails: training goes on to the next one, and the last of a run finds another place.

A disk that is full, read-only or gone in the middle of a run may be mended before the run ends, so only what is saved
last must not be lost: it is written to another folder that takes it, and the run ends with an error that says where.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from library.disk_space import CannotWriteError
from library.errors import Problem, raise_if_any

log = logging.getLogger(__name__)

Write = Callable[[Path], Path]
"""Writes below a folder, and returns what it wrote."""
Keep = Callable[..., Path | None]
"""``keep(folder, write, last=...)``: as :meth:`Rescue.keep`."""

_PREFIX: Final = "rescued-"


def keep_or_fail(folder: Path, write: Write, *, last: bool) -> Path | None:
    """Write below ``folder``; whatever goes wrong is raised."""
    return write(folder)


def other_places() -> Iterator[Path]:
    """Where a user would look for what could not be written to its place: current, home and temporary folder."""
    found: set[Path] = set()
    for find in (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        # There may be no home, and the current folder may be gone.
        with suppress(OSError, RuntimeError):
            place = find().resolve()
            if place not in found and os.access(place, os.W_OK):
                found.add(place)
                yield place


class Rescue:
    """Keeps a run alive when something cannot be saved, and sees to what is saved last.

    Args:
        places: Folders to try when the place of a result does not take what is saved last.
    """

    def __init__(self, places: Callable[[], Iterable[Path]] = other_places) -> None:
        self._places = places
        self._chosen: list[Path] = []
        self._missed: list[str] = []
        self._problems: list[Problem] = []

    def keep(self, folder: Path, write: Write, *, last: bool) -> Path | None:
        """Write below ``folder``, or see to what follows from its failing.

        Args:
            folder: The folder of the results.
            write: Writes below a given folder.
            last: Nothing is saved after this: if it fails, another place is looked for.

        Returns:
            What was written, wherever that is; None when nothing was.
        """
        try:
            return write(folder)
        except CannotWriteError as error:
            problem = error.problems[0]
        if last:
            return self._elsewhere(write, problem)
        log.error("%s\ntraining goes on, and saves again when that is due", problem)
        self._missed.append(problem.what)
        return None

    def _elsewhere(self, write: Write, problem: Problem) -> Path | None:
        log.error("%s\nlooking for another place", problem)
        for folder in self._folders():
            try:
                kept = write(folder)
            except CannotWriteError as error:
                log.warning("not there either: %s", error.problems[0].what)
                with suppress(OSError):
                    folder.rmdir()
                continue
            log.error("saved in another place: %s", kept)
            self._chosen = [folder]
            remedy = f"Make room, and move it from there to {problem.where}."
            self._problems.append(Problem(f"{problem.what}; it is in {kept} instead", problem.where, remedy))
            return kept
        remedy = "Make room, then continue from the last saved state with --resume; earlier files are untouched."
        self._problems.append(Problem(f"{problem.what}, nor to another place", problem.where, remedy))
        return None

    def _folders(self) -> Iterator[Path]:
        """The folder that has taken something already, then new ones."""
        yield from list(self._chosen)
        for place in self._places():
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))

    def settle(self) -> None:
        """Say at the end of a run what is missing.

        Raises:
            UserError: What was saved last is not where it belongs.
        """
        for what in self._missed:
            log.warning("missing among the results: %s", what)
        raise_if_any(self._problems)
