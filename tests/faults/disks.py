"""A small disk of its own, which can be filled to the byte and made read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096


class SmallDisk:
    """A file system in memory, mounted at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free(self) -> int:
        return os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize

    def leave(self, free: int) -> None:
        """Fill the disk until ``free`` bytes are left: whole pages, as the file system counts in them."""
        ballast = self.path / "ballast"
        ballast.unlink(missing_ok=True)
        with ballast.open("wb") as file:
            for _ in range((self.free - free) // PAGE):
                file.write(bytes(PAGE))
        assert self.free - free < PAGE

    def empty(self) -> None:
        (self.path / "ballast").unlink(missing_ok=True)

    def allow_writing(self, *, allowed: bool) -> None:
        mode = "rw" if allowed else "ro"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)

    @property
    def files(self) -> set[str]:
        found = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())
        return {name for name in found if name != "ballast"}


@contextmanager
def mounted(path: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """A small disk; the test is skipped where none may be mounted."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no command mount")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
