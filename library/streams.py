"""The screen: output that cannot be written, because whoever read it has gone, must not end a run."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

_STANDARD: Final = (0, 1, 2)


class LastingStream:
    """Passes everything on to another stream; what that does not take is lost, and nothing else.

    Args:
        stream: The other stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, if that can be done."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Send what was written, if that can be done."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                self._go_nowhere()
        except ValueError:
            # It was closed.
            return

    def _go_nowhere(self) -> None:
        """Let the system drop what is written from now on, also by libraries and by processes that are started."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_the_screen() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` last, also where they were closed before the program began."""
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that is opened would be taken for the screen. The lowest free number is given.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, LastingStream(stream))
