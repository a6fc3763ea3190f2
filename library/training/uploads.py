"""The queue of saved files on their way to another place: in order, tried again, never in the way of training.

One thread sends one file or folder after the other. What fails for now is tried again, after waits that double; what is
refused is not. Whatever happens, the run goes on, and at its end what did not arrive is named.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from library.disk_space import bytes_of
from library.training.privacy import shown_path

log = logging.getLogger(__name__)

HELD_BYTES: Final = 20 * 10**9
"""Bytes that may stay on the disk, for as long as they wait, beyond what the saving options keep."""

_TELL_SECONDS: Final = 30.0


class RefusedError(Exception):
    """It will not be accepted, however often it is sent; the text says why."""


class UnreachedError(Exception):
    """It has not arrived, and may at another time; the text says why.

    Args:
        reason: What went wrong.
        retry_after: Seconds that the other side asks to wait.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to wait for what, in seconds.

    Attributes:
        first: Before the second attempt; each further wait is twice as long.
        longest: Between two attempts, unless the other side asks for more.
        one: From the first attempt to the last at one upload.
        save: Training waits for an upload at most so long; then the upload goes on beside it.
        end: At the end of the run, since something has last arrived.
    """

    first: float = 1.0
    longest: float = 60.0
    one: float = 15 * 60
    save: float = 5 * 60
    end: float = 30 * 60


def persistently(action: Callable[[], None], patience: Patience, stopped: threading.Event) -> None:
    """Do ``action``, again and again while it fails with :class:`UnreachedError`.

    Raises:
        RefusedError: At the first refusal.
        UnreachedError: Time is up, or ``stopped`` was set.
    """
    deadline, wait = time.monotonic() + patience.one, patience.first
    while True:
        try:
            return action()
        except UnreachedError as error:
            pause = max(wait, error.retry_after)
            if time.monotonic() + pause > deadline or stopped.wait(pause):
                raise
            log.debug("trying again: %s", error)
            wait = min(2 * wait, patience.longest)


class Send(Protocol):
    """Sends a file or a folder; done when it returns."""

    def __call__(self, path: Path) -> None:
        """Send ``path``.

        Raises:
            RefusedError: It is not accepted.
            UnreachedError: It has not arrived this time.
        """


@dataclass(slots=True, eq=False)
class _Upload:
    """One saved file or folder.

    Attributes:
        path: Where it is.
        settled: Set once it has arrived or was given up for now.
        remove: Removes it, once it need not be kept any longer.
        bytes: Its size, if it is to be removed.
    """

    path: Path
    settled: threading.Event = field(default_factory=threading.Event)
    remove: Callable[[Path], None] | None = None
    bytes: int = 0


class Uploads:
    """The queue.

    As a context manager it waits at the end for what is still on its way, unless the user has broken off the run.

    Args:
        send: Sends one file or folder.
        background: Training goes on while files are sent; otherwise it waits for each, within limits.
        patience: Waiting times.
        held_bytes: Most bytes to keep for the sake of uploads.
    """

    def __init__(
        self, send: Send, *, background: bool, patience: Patience | None = None, held_bytes: int = HELD_BYTES
    ) -> None:
        self._send = send
        self._background = background
        self._patience = patience or Patience()
        self._held_bytes = held_bytes
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._queue: deque[_Upload] = deque()
        self._given_up: list[_Upload] = []
        self._thread: threading.Thread | None = None
        self.arrived: list[Path] = []
        self.missing: dict[Path, str] = {}

    def add(self, path: Path) -> None:
        """Send ``path`` after everything that waits already; an earlier version of it that waits is dropped."""
        upload = _Upload(path)
        with self._changed:
            waits = bool(self._queue)
            for earlier in list(self._queue)[1:] + self._given_up:
                if earlier.path == path:
                    self._drop(earlier)
            self._queue.append(upload)
            self.missing[path] = "it was still on its way"
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        # Where an earlier one could not be waited for, the next will not be quicker.
        if self._background or waits or upload.settled.wait(self._patience.save):
            return
        log.warning("%s is still being uploaded; training goes on meanwhile", shown_path(path))

    def keeps(self, path: Path, remove: Callable[[Path], None]) -> bool:
        """Whether ``path``, which is due to be removed, is still needed; ``remove`` is then called later.

        What is kept so takes a limited space: beyond it the oldest is removed although it has not arrived.
        """
        with self._changed:
            waiting = [one for one in (*self._given_up, *self._queue) if one.path == path]
            if not waiting:
                return False
            upload = waiting[-1]
            upload.remove, upload.bytes = remove, _size(path)
            first = self._queue[0] if self._queue else None
            held = [one for one in (*self._given_up, *self._queue) if one.remove is not None]
            while held and sum(one.bytes for one in held) > self._held_bytes:
                oldest = next((one for one in held if one is not first), None)
                if oldest is None:
                    break
                held.remove(oldest)
                self._drop(oldest)
                self.missing[oldest.path] = "it was removed before it could be uploaded, to save space"
                log.warning("%s has not been uploaded, and is removed to save space", shown_path(oldest.path))
                _remove(oldest)
        return True

    def finish(self) -> None:
        """Wait for what is still on its way, and say what did not arrive; Ctrl-C ends the waiting."""
        with self._changed:
            self._queue.extend(self._given_up)
            self._given_up.clear()
            self._changed.notify_all()
        try:
            self._wait()
        except KeyboardInterrupt:
            log.warning("not waiting for uploads any longer")
        self._close()

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._close()
            return
        if kind is not None and self.missing:
            log.warning("the run has failed; what it had saved is uploaded before the reason is shown")
        self.finish()

    def _wait(self) -> None:
        """Until the queue is empty, or nothing has arrived for long."""
        arrived, since, told = len(self.arrived), time.monotonic(), -_TELL_SECONDS
        with self._changed:
            while self._queue:
                now = time.monotonic()
                if len(self.arrived) > arrived:
                    arrived, since = len(self.arrived), now
                if now - since > self._patience.end:
                    log.warning("no upload has arrived for %d minutes: not waiting any longer", self._patience.end / 60)
                    return
                if now - told >= _TELL_SECONDS:
                    told = now
                    log.info(
                        "waiting for uploads (Ctrl-C leaves); left: %d, now: %s",
                        len(self._queue),
                        shown_path(self._queue[0].path),
                    )
                self._changed.wait(min(_TELL_SECONDS, self._patience.end))

    def _close(self) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
            if self.arrived:
                log.info("uploaded: %d", len(self.arrived))
            for path, reason in self.missing.items():
                log.warning("not uploaded: %s (%s)", shown_path(path), reason)

    def _work(self) -> None:
        while not self._stopped.is_set():
            with self._changed:
                while not self._queue and not self._stopped.is_set():
                    self._changed.wait()
                if self._stopped.is_set():
                    return
                upload = self._queue[0]
            reason, again = self._attempt(upload.path)
            with self._changed:
                self._queue.remove(upload)
                self._settle(upload, reason, again)
                self._changed.notify_all()
            upload.settled.set()

    def _attempt(self, path: Path) -> tuple[str | None, bool]:
        """Why ``path`` has not arrived, None if it has; and whether it is worth another attempt."""

        def send() -> None:
            try:
                self._send(path)
            except UnreachedError as error:
                self.missing[path] = str(error)
                raise

        try:
            persistently(send, self._patience, self._stopped)
        except UnreachedError as error:
            return str(error), True
        except RefusedError as error:
            return str(error), False
        except Exception as error:  # whatever the sender stumbles over must not end the thread
            log.debug("uploading %s", shown_path(path), exc_info=True)
            return type(error).__name__, False
        return None, False

    def _settle(self, upload: _Upload, reason: str | None, again: bool) -> None:
        """Take in what became of ``upload``."""
        path = upload.path
        newer = any(other.path == path for other in self._queue)
        if reason is None:
            log.info("uploaded: %s", shown_path(path))
            self.arrived.append(path)
            if not newer:
                self.missing.pop(path, None)
            # The way is free again.
            self._queue.extend(self._given_up)
            self._given_up.clear()
        elif not newer and not self._stopped.is_set():
            log.warning("not uploaded%s: %s (%s)", " for now" if again else "", shown_path(path), reason)
            self.missing[path] = reason
            if again:
                self._given_up.append(upload)
                return
        if not newer and not self._stopped.is_set():
            _remove(upload)

    def _drop(self, upload: _Upload) -> None:
        """Take ``upload`` out of the queue."""
        if upload in self._queue:
            self._queue.remove(upload)
        if upload in self._given_up:
            self._given_up.remove(upload)
        upload.settled.set()


def _remove(upload: _Upload) -> None:
    """Remove what was kept for the upload alone."""
    if upload.remove is not None:
        upload.remove(upload.path)


def _size(path: Path) -> int:
    """Bytes of a file or folder; 0 where it cannot be looked at."""
    try:
        return bytes_of(path)
    except OSError:
        return 0
