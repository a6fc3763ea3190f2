"""What signals ask of a run: to stop after this step, to stop at once, or to save and go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from tqdm import tqdm

_STOP: Final = (signal.SIGINT, signal.SIGTERM)
_SAVE: Final = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))
"""Batch systems send it some time before they take the machine away; Windows does not know it."""


class Interruption:
    """Notices signals, so that the step in progress is finished first.

    The first Ctrl-C or SIGTERM ends the run after the step, the second one at once; SIGUSR1 lets it save and go on.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._save = False

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by the signal; 0 when none came."""
        return 128 + self.signal if self.signal is not None else 0

    def take_save_request(self) -> bool:
        """Whether this process was asked to save since this was asked last."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def watched(self) -> Iterator["Interruption"]:
        """Watch for signals inside the block; the former handlers come back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        handlers = {**dict.fromkeys(_STOP, self._stop), **dict.fromkeys(_SAVE, self._save_and_go_on)}
        former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt(128 + number)
        self.signal = number
        tqdm.write("stopping after this step, which is saved; once more stops at once")

    def _save_and_go_on(self, number: int, frame: FrameType | None) -> None:
        self._save = True
