"""Images through a model: read ahead in threads, in batches of whole ones, results written as they come.

Only what the threads and the next batch need is in memory, whatever the number of images. An image that cannot be read
is named and left out. Whoever stops the work (Ctrl-C, SIGTERM) keeps every result that is written.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Final, Generic, TypeVar

from finetune.processes import Processes
from library.errors import UserError

EXIT_BAD_IMAGES: Final = 1
"""Exit code of a tool that has done its work but for images that cannot be read."""

_WRITES_AHEAD: Final = 64
"""Results that may wait to be written."""

_LINE_EVERY: Final = 30.0
"""Seconds between log lines where there is no terminal to show a bar."""

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that could not be read.

    Attributes:
        name: Its path as it was found.
        reason: What is wrong with it.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageWork(Generic[I, R]):
    """What is done with each image.

    Attributes:
        read: From a file to what the model takes; runs in threads. Raises UserError for a bad image.
        infer: From a batch of those to a result each; runs in the main thread.
        write: Keeps the result of an image; runs in a thread of its own, one result after the other, in order.
        batch_size: Images in a batch.
        threads: Threads that read; 0 reads in the main thread, None has one a core.
    """

    read: Callable[[Path], I]
    infer: Callable[[Sequence[Path], Sequence[I]], Sequence[R]]
    write: Callable[[Path, R], None]
    batch_size: int = 1
    threads: int | None = None

    def run(self, images: Sequence[Path], *, shows_progress: bool = True) -> list[BadImage]:
        """Do it for all ``images``; returns those that could not be read.

        Raises:
            KeyboardInterrupt: Somebody stopped it; what was inferred is written.
            UserError: A result cannot be written.
        """
        bad: list[BadImage] = []
        progress = _Progress(len(images)) if shows_progress else None
        with _stopped_by_signals(), _Writer() as writer, _closing(progress):
            batch: list[tuple[Path, I]] = []
            for path, content in self._contents(images):
                if isinstance(content, BadImage):
                    log.warning("left out: %s: %s", content.name, content.reason)
                    bad.append(content)
                    _advance(progress, 1)
                    continue
                batch.append((path, content))
                if len(batch) == self.batch_size:
                    self._finish(batch, writer, progress)
                    batch = []
            if batch:
                self._finish(batch, writer, progress)
        return bad

    def _finish(self, batch: Sequence[tuple[Path, I]], writer: "_Writer", progress: "_Progress | None") -> None:
        paths = [path for path, _ in batch]
        results = self.infer(paths, [content for _, content in batch])
        assert len(results) == len(batch), "a result an image"
        for path, result in zip(paths, results, strict=True):
            writer.add(self.write, path, result)
        _advance(progress, len(batch))

    def _contents(self, images: Sequence[Path]) -> Iterator[tuple[Path, I | BadImage]]:
        threads = (os.cpu_count() or 1) if self.threads is None else self.threads
        if threads == 0:
            for path in images:
                yield path, self._content(path)
            return
        pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        try:
            rest = iter(images)
            ahead = self.batch_size + 2 * threads
            waiting = deque((path, pool.submit(self._content, path)) for path in islice(rest, ahead))
            while waiting:
                path, future = waiting.popleft()
                content = future.result()
                # Before the image is used, so that the threads have work while the model computes.
                waiting.extend((path, pool.submit(self._content, path)) for path in islice(rest, 1))
                yield path, content
        finally:
            pool.shutdown(cancel_futures=True)

    def _content(self, path: Path) -> I | BadImage:
        try:
            return self.read(path)
        except UserError as error:
            return BadImage(str(path), error.problems[0].what)


def report(bad: Sequence[BadImage], *, done: int, processes: Processes) -> int:
    """Say how the work of all processes ended; returns the exit code.

    Args:
        bad: The images of this process that could not be read.
        done: Images that this process has finished.
        processes: The processes of the run.
    """
    all_bad = processes.gather(list(bad))
    total = sum(processes.gather([done]))
    if not processes.is_main:
        return EXIT_BAD_IMAGES if all_bad else 0
    log.info("%d images done", total)
    if all_bad:
        lines = [f"  {one.name}: {one.reason}" for one in sorted(all_bad, key=lambda one: one.name)]
        heading = f"{len(all_bad)} images could not be read and have no result; replace or remove them:"
        print("\n".join([heading, *lines]), file=sys.stderr)
        return EXIT_BAD_IMAGES
    return 0


@dataclass(slots=True)
class _Progress:
    """A bar with rate and time left; log lines now and then where nobody sees a bar."""

    total: int
    done: int = 0
    _began: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)
    _bar: Any = None

    def __post_init__(self) -> None:
        from tqdm import tqdm

        # None asks whether the error output is a terminal.
        self._bar = tqdm(total=self.total, unit="image", disable=None, smoothing=0.1)

    def advance(self, count: int) -> None:
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._told >= _LINE_EVERY:
            self._told = now
            rate = self.done / (now - self._began)
            left = (self.total - self.done) / rate
            log.info("%d of %d images, %.1f a second, %.0f minutes left", self.done, self.total, rate, left / 60)

    def close(self) -> None:
        self._bar.close()


def _advance(progress: _Progress | None, count: int) -> None:
    if progress is not None:
        progress.advance(count)


@contextmanager
def _closing(progress: _Progress | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if progress is not None:
            log.warning("stopped after %d of %d images", progress.done, progress.total)
        raise
    finally:
        if progress is not None:
            progress.close()


class _Writer:
    """Writes results in a thread, in the order in which they come; a mistake is raised at the next opportunity."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()

    def add(self, write: Callable[[Path, Any], None], path: Path, result: Any) -> None:
        self._waiting.append(self._pool.submit(write, path, result))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _WRITES_AHEAD):
            self._waiting.popleft().result()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            for future in self._waiting:
                future.result()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM (a closed session, a queue's time limit) stop the work as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
