"""Running the tools in tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError

ROOT = Path(__file__).parents[2]
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc_per_node=2"),
    # A free port is chosen, so that runs at the same time do not meet.
    *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
)


def texts(folder: Path, extension: str) -> dict[str, bytes]:
    """Every text file below ``folder``."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(f"*{extension}")}


def mistake(main, *argv) -> str:
    """What the tool says of a command line that it refuses."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in argv])
    return str(caught.value)


def start(script: str | Path, *argv, cwd: Path = ROOT, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """The tool as users start it, in a process of its own."""
    words = [sys.executable, *launcher, str(script), *map(str, argv)]
    return subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
