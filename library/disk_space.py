"""Room on a disk: whether there is enough for what is about to be written, and how much is missing where there is not.

The system is asked before a large file is begun; what it says is not always the whole truth (quotas, network drives,
other programs), so writing may fail for want of room all the same, and is then explained in the same words.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from library.errors import UserError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_REMEDY: Final = "Free space on the disk or choose another folder; earlier files are untouched."
_TOLD_BY_RUST: Final = re.compile(r"\(os error (\d+)\)")


class CannotWriteError(UserError):
    """A place that cannot be written to, now: the same may succeed later, or elsewhere."""

    def __init__(self, what: str, *, where: str, system: OSError, size: int) -> None:
        super().__init__(what, where=where, remedy=_REMEDY)
        self.system = system
        self.size = size


def free_bytes(folder: Path) -> int | None:
    """What may still be written below ``folder``, which need not exist yet; None where the system does not say."""
    try:
        usage = shutil.disk_usage(nearest(folder))
    except OSError:
        return None
    # Some network drives call themselves empty in every respect.
    return usage.free if usage.total else None


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder.

    Raises:
        OSError: It cannot be looked at.
    """
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def nearest(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists."""
    absolute = folder.absolute()
    return next(part for part in (absolute, *absolute.parents) if part.exists())


def may_write(folder: Path) -> bool:
    """Whether files may be made in ``folder``, or where it would be made."""
    return os.access(nearest(folder), os.W_OK)


def check_room(path: Path, size: int, *, called: str | None = None) -> None:
    """Refuse to begin what will not fit.

    Args:
        path: The file or folder; what it replaces stays until it is complete.
        size: Its bytes.
        called: What it is called in the message; its name when absent.

    Raises:
        CannotWriteError: Saying how much is missing.
    """
    free = free_bytes(path.parent)
    if free is not None and free < size:
        raise _unwritable(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size, called)


@contextmanager
def room_for(path: Path, size: int = 0) -> Iterator[None]:
    """Around the writing of ``path``, and the removal of what was written of it when that fails.

    Args:
        path: The file or folder.
        size: Its bytes, as far as they are known; what it replaces stays until it is complete.

    Raises:
        CannotWriteError: It does not fit, and is not begun; or the system did not let it be written.
    """
    check_room(path, size)
    failed: OSError | None = None
    try:
        yield
    except Exception as error:
        failed = system_error(error)
        if failed is None:
            raise
        # Of a file that is written under a temporary name, its writer may know more.
        size = max(size, error.size) if isinstance(error, CannotWriteError) else size
    if failed is not None:
        raise _unwritable(path, failed, size) from failed


def _unwritable(path: Path, system: OSError, size: int, called: str | None = None) -> CannotWriteError:
    what = f"cannot write {called or path.name}: {system.strerror or system}"
    if system.errno in _FULL and size:
        what += f"; {shown_size(size)} are needed"
        free = free_bytes(path.parent)
        if free is not None and free < size:
            what += f", {shown_size(free)} are free: {shown_size(size - free)} are missing"
    return CannotWriteError(what, where=str(path.parent), system=system, size=size)


def system_error(problem: BaseException) -> OSError | None:
    """What the system said, where a library has put it into an error of its own; None where it was something else."""
    if isinstance(problem, CannotWriteError):
        return problem.system
    if isinstance(problem, UserError):
        return None
    found: BaseException | None = problem
    while found is not None:
        if isinstance(found, OSError):
            return found
        if told := _TOLD_BY_RUST.search(str(found)):
            return OSError(int(told[1]), os.strerror(int(told[1])))
        found = found.__cause__ or found.__context__
    return None


def shown_size(count: float) -> str:
    """Bytes as a person reads them: ``640 kB``, ``2.1 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
