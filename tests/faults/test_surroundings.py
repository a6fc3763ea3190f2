"""A terminal that is closed, a home folder that is not there: what a run can do without must not end it."""

import errno
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.streams import LastingStream
from tests.faults.runs import RESULT, arguments, train
from tests.scripts.runs import Run, tensor_hash

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")


def shell(command: str, *given: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a shell, where ``$@`` stands for the command line."""
    script = [sys.executable, str(ROOT / "train_network.py"), *given]
    return subprocess.run(
        ["bash", "-c", command, "bash", *script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
        check=False,
    )


def test_nobody_reads_the_screen(model: Path, plain: Callable[[int], Run], tmp_path: Path) -> None:
    """Whoever reads errors goes after one line, the rest is closed, and nothing can be kept in the home folder."""
    command = '"$@" <&- 2>&1 >&- | head -n 1; exit ${PIPESTATUS[0]}'
    given = arguments(model, tmp_path, "--seed=7", f"--output_dir={tmp_path / 'out'}")
    done = shell(command, *given, HOME="/dev/null/nobody", XDG_CACHE_HOME="/dev/null/cache")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert tensor_hash(tmp_path / "out" / RESULT) == plain(4).tensor_hash(RESULT)


def test_a_mistake_ends_with_its_code_though_nobody_reads_it() -> None:
    assert shell('"$@" 2>&-').returncode == 2


def test_there_is_no_home_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError):
        Path.home()
    run = train(tmp_path / "out", *arguments(model, tmp_path, images=300, steps=1))
    assert run.code == 0
    assert {RESULT, "thing-report.html"} <= run.files


def test_a_full_disk_loses_lines_and_not_the_stream() -> None:
    """As where the screen is sent to a file."""

    class Stream:
        encoding = "utf-8"
        full = True
        written = ""

        def write(self, text: str) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written += text

    stream = Stream()
    lasting = LastingStream(stream)
    lasting.write("lost")
    stream.full = False
    lasting.write("kept")
    assert stream.written == "kept"
    assert lasting.encoding == "utf-8"
