"""One data loader for the whole run: workers are handed keys, in order, and live until the run ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.data.dataset import Batch
from library.data.epoch_plan import MicroBatch
from library.data.options import LoaderOptions
from library.errors import Problem, UserError, raise_if_any


class BatchSource(Protocol):
    """Makes a batch from its key alone."""

    def __getitem__(self, key: MicroBatch) -> Batch:
        """The batch of ``key``."""


KeySource = Callable[[], Iterable[MicroBatch]]
"""Gives the keys of this process, in order, from the step where training starts or continues."""


def build_loader(
    source: BatchSource, keys: KeySource, options: LoaderOptions, *, pin_memory: bool = False
) -> Iterable[Batch]:
    """The batches of ``keys``, made ahead by worker processes (or on demand in this one, with 0 workers).

    The batches do not depend on the number of workers.

    Args:
        source: Makes the batches; sent to the workers.
        keys: Called once for every iteration over the result.
        options: Number of workers, at most one a processor is started. They live as long as an iteration, which spans
            all epochs, so that ``persistent_data_loader_workers`` has nothing left to ask for.
        pin_memory: Hand out batches in page-locked memory; for CUDA only.

    Returns:
        Batches; iterating raises a UserError where making one did, and where a worker process is gone.
    """
    workers = min(options.max_data_loader_n_workers, available_processors())
    loader: DataLoader[Any] = DataLoader(
        _Guarded(source),
        sampler=_Keys(keys),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_prepare_worker if workers else None,
        pin_memory=pin_memory,
        # Given so that the global generator is not drawn from; nothing else uses it.
        generator=torch.Generator(),
    )
    return _Batches(loader)


def available_processors() -> int:
    """Number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Failure:
    """A user's mistake that was met in a worker: torch would bring an exception home as text with a traceback."""

    problems: tuple[Problem, ...]


class _Guarded(Dataset[Batch | _Failure]):
    """Turns a UserError into a value that crosses to the main process unchanged."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def __getitem__(self, key: MicroBatch) -> Batch | _Failure:
        try:
            return self._source[key]
        except UserError as error:
            return _Failure(error.problems)


class _Keys(Sampler[MicroBatch]):
    def __init__(self, keys: KeySource) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._keys())


class _Batches:
    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        made_ahead, workers = _start(self._loader)
        problems: tuple[Problem, ...] = ()
        try:
            for made in made_ahead:
                if isinstance(made, _Failure):
                    problems = made.problems
                    break
                yield made
        except (RuntimeError, OSError, EOFError):
            problems = _lost(workers)
            if not problems:
                raise
        # Ends the workers, which an error's traceback would otherwise keep alive.
        del made_ahead
        raise_if_any(problems)


def _start(loader: "DataLoader[Any]") -> tuple[Iterator[Any], list[BaseProcess]]:
    """Start the workers, and undo torch's way of reporting their death.

    Torch handles SIGCHLD by raising an error wherever the main process happens to be, be it in the middle of writing a
    file. Without the handler it reports the loss a few seconds later, when the next batch is asked for.
    """
    others = set(active_children())
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        former = signal.getsignal(signal.SIGCHLD)
        started = iter(loader)
        signal.signal(signal.SIGCHLD, former)
    else:
        started = iter(loader)
    return started, [child for child in active_children() if child not in others]


def _lost(workers: Sequence[BaseProcess]) -> tuple[Problem, ...]:
    """The problem that one of ``workers`` is gone, where one is: torch has no exception of its own for that."""
    # A connection breaks a moment before its process counts as ended.
    if not workers or not (gone := wait([worker.sentinel for worker in workers], timeout=1)):
        return ()
    for worker in workers:
        if worker.sentinel in gone:
            # Its exit code is known a moment later.
            worker.join(1)
    codes = ", ".join(str(worker.exitcode) for worker in workers if not worker.is_alive())
    return (
        Problem(
            f"a process that loads data has ended unexpectedly (exit code {codes})",
            "--max_data_loader_n_workers",
            "Memory may have run out (in a container: shared memory, see --shm-size): use fewer workers, or 0.",
        ),
    )


def _heed_the_next(number: int, frame: FrameType | None) -> None:
    """The main process finishes its step first, for which it needs its workers; should one hang, it is told again."""
    signal.signal(number, signal.SIG_DFL)


def _as_it_is(made: Any) -> Any:
    return made


def _prepare_worker(number: int) -> None:
    """Keep a worker to one thread, and let the main process decide what signals to all of the group mean."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _heed_the_next)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
