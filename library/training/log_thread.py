"""A log that never holds up a run: a thread writes it, and may be slow, but not without end."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from library.training.log_targets import LogTarget

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_WAITING: Final = 2000
"""Entries that may wait to be written: about as many steps."""
PATIENCE: Final = 30.0
"""Seconds that a state, or the end of a run, waits for what is left to be written."""
_GLANCE: Final = 0.05


class InBackground:
    """Passes on to another target, in a thread of its own, all that it is told; see :class:`LogTarget`.

    What goes wrong in the thread is raised when the next is told, or at the end.

    Args:
        target: Where it is logged; only the thread uses it from now on.
        most_waiting: Entries that may wait.
        patience: Seconds to wait at the end.
    """

    def __init__(self, target: LogTarget, *, most_waiting: int = MOST_WAITING, patience: float = PATIENCE) -> None:
        self.name = target.name
        self._target = target
        self._patience = patience
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(most_waiting)
        self._problem: Exception | None = None
        self._failed = False
        self._is_stuck = False
        # A disk that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"log to {self.name}", daemon=True)
        self._thread.start()

    def add(self, figures: Mapping[str, float], *, at: int, step: int) -> None:
        """As :class:`LogTarget`."""
        self._tell(lambda: self._target.add(figures, at=at, step=step))

    def add_image(self, number: int, image: "Image", *, prompt: str, step: int) -> None:
        """As :class:`LogTarget`."""
        self._tell(lambda: self._target.add_image(number, image, prompt=prompt, step=step))

    def flush(self) -> None:
        """As :class:`LogTarget`, within some time."""
        written = threading.Event()

        def write() -> None:
            self._target.flush()
            written.set()

        self._tell(write)
        until = time.monotonic() + self._patience
        while not written.wait(_GLANCE):
            if self._problem is not None:
                raise self._problem
            if time.monotonic() > until:
                raise self._stuck()

    def close(self, *, failed: bool) -> None:
        """As :class:`LogTarget`, within some time."""
        self._failed = failed
        if self._is_stuck:
            return
        self._tell(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            raise self._stuck()
        if self._problem is not None:
            raise self._problem

    def _stuck(self) -> TimeoutError:
        self._is_stuck = True
        return TimeoutError(f"nothing was written for {self._patience:g} seconds")

    def _tell(self, what: Callable[[], None] | None) -> None:
        if self._problem is not None:
            raise self._problem
        try:
            self._waiting.put_nowait(what)
        except queue.Full:
            self._is_stuck = True
            raise TimeoutError("writing it does not keep up with the run") from None

    def _work(self) -> None:
        try:
            while (what := self._waiting.get()) is not None:
                what()
            self._target.close(failed=self._failed)
        except Exception as problem:
            self._problem = problem
            # Its own threads end; that it cannot write any more is known.
            with suppress(Exception):
                self._target.close(failed=True)
