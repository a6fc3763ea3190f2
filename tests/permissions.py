"""Write protection that holds for root as well, whom tests in a container often run as."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

_VERSION = 0x20080522
_OVERRIDES = 1 << 1 | 1 << 2
"""The capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder and those in it may not be written to inside the block."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {path: path.stat().st_mode for path in folders}
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def bound_by_permissions(call: Callable[[], T]) -> T:
    """What ``call`` gives in a thread that permissions bind; root's right to pass over them ends with a thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _give_up_overrides()
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _give_up_overrides() -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    if sys.platform != "linux":
        pytest.skip("only on Linux can root give up its rights for a thread")
    library = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    # Effective, permitted and inheritable, of the capabilities below 32 first.
    assert library.capget(header, sets) == 0
    for place in range(3):
        sets[place] &= ~_OVERRIDES
    assert library.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
