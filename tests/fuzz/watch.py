"""Runs a reader on one input and sees to it that nothing happens but an answer or a refusal, in time.

Python tells an audit hook of every file it opens for writing, renames or removes, and of every program it starts; a
clock of the processor time that the process uses ends what takes too long, whatever else the machine does.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError

SECONDS = 2.0
"""Processor time that one input may take."""

_PATIENCE = 60.0
"""Seconds on the clock, for what waits without computing."""

_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"),
    *("os.truncate", "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"),
}
_STARTS = {"os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn", "subprocess.Popen",
           "socket.connect", "webbrowser.open"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file as somebody may have written it."""

    name: str
    content: bytes


class TooLong(BaseException):
    """A reader did not come to an end."""


class Escaped(BaseException):
    """A reader wrote where it must not, or started something."""


_allowed: Path | None = None


def _look(event: str, arguments: tuple[object, ...]) -> None:
    if _allowed is None:
        return
    if event in _STARTS:
        raise Escaped(f"{event} {arguments}")
    if event == "open":
        path, _, flags = arguments
        places = [path] if isinstance(flags, int) and flags & _WRITING_FLAGS else []
    else:
        places = [place for place in arguments if isinstance(place, (str, bytes))] if event in _CHANGES else []
    for place in places:
        if isinstance(place, (str, bytes, os.PathLike)) and not _is_inside(os.fsdecode(place)):
            raise Escaped(f"{event} {place!r}")


def _is_inside(place: str) -> bool:
    real = os.path.realpath(place)
    # Byte code of modules that a reader imports.
    return real == os.devnull or "__pycache__" in real or Path(real).is_relative_to(_allowed or "")


sys.addaudithook(_look)


@contextmanager
def _confined(folder: Path) -> Iterator[None]:
    global _allowed
    _allowed = Path(os.path.realpath(folder))
    try:
        yield
    finally:
        _allowed = None


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    # Again and again, as code that is interrupted may take the first for an error of its own.
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.1)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def warm_up(read: Callable[[Path], object], cases: Iterable[Case], folder: Path) -> None:
    """Let ``read`` import what it imports when it is first called: that is no part of what is watched."""
    for case in cases:
        path = folder / case.name
        path.write_bytes(case.content)
        with suppress(UserError):
            read(path)
        path.unlink(missing_ok=True)


def answer(read: Callable[[Path], object], case: Case, folder: Path) -> str | None:
    """What ``read`` refuses ``case`` with, a file in ``folder``; None where it takes it.

    Everything else it does is raised: any other exception, :class:`TooLong` and :class:`Escaped`.
    """
    path = folder / case.name
    path.write_bytes(case.content)
    try:
        with warnings.catch_warnings(), _confined(folder), _limited():
            warnings.simplefilter("ignore")
            read(path)
    except UserError as error:
        refusal = error
    else:
        return None
    finally:
        path.unlink(missing_ok=True)
    message = str(refusal)
    message.encode()
    assert all(letter == "\n" or letter.isprintable() or letter >= "\xa0" for letter in message), message
    assert all(problem.remedy for problem in refusal.problems), refusal.problems
    return message
