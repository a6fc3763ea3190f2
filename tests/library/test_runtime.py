"""Starting Accelerate, and what is said when a launcher did something else than asked."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.runtime import _launcher_notices, _processes_asked_of_launcher, set_up_logging, start_runtime
from library.runtime_options import ConsoleOptions, RuntimeOptions
from tests.permissions import bound_by_permissions, read_only

pytestmark = pytest.mark.usefixtures("accelerate_anew")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_frozen_weights_follow_the_precision(precision: str, dtype: torch.dtype) -> None:
    runtime = start_runtime(RuntimeOptions(mixed_precision=precision, seed=3), find_unused_parameters=False)
    assert runtime.weight_dtype == dtype
    assert (runtime.seed, runtime.world, runtime.rank, runtime.is_main) == (3, 1, 0, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can train fp16")
def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="fp16 cannot be trained on a CPU"):
        start_runtime(RuntimeOptions(mixed_precision="fp16", seed=3), find_unused_parameters=False)


def test_a_seed_is_drawn_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        runtime = start_runtime(RuntimeOptions(), find_unused_parameters=False)
    assert 0 <= runtime.seed < 2**32
    assert f"--seed={runtime.seed}" in caplog.text


def test_a_launcher_with_another_precision_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (notice,) = _launcher_notices(RuntimeOptions(mixed_precision="bf16"), 2, has_accelerator=True)
    assert "'fp16'" in notice
    assert "'bf16' is used" in notice
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not list(_launcher_notices(RuntimeOptions(mixed_precision="bf16"), 2, has_accelerator=True))


class Parent:
    def __init__(self, command: list[str]) -> None:
        self._command = command

    def parent(self) -> "Parent":
        return self

    def cmdline(self) -> list[str]:
        return self._command


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"], 2),
        (["python", "-m", "accelerate.commands.launch", "launch", "--num_processes=4", "x.py"], 4),
        (["python", "/bin/accelerate", "launch", "x.py"], 0),
        (["bash"], 0),
    ],
)
def test_processes_the_launcher_was_asked_for(command: list[str], asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.Process", lambda: Parent(command))
    assert _processes_asked_of_launcher() == asked


def test_fewer_processes_than_asked_for_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.runtime._processes_asked_of_launcher", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (notice,) = _launcher_notices(RuntimeOptions(), 1, has_accelerator=False)
    assert "torchrun --nproc_per_node 2" in notice


def test_log_lines_go_to_the_file(tmp_path) -> None:
    path = tmp_path / "log" / "run.txt"
    set_up_logging(ConsoleOptions(console_log_file=path, console_log_level="WARNING"))
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    text = path.read_text(encoding="utf-8")
    assert "loud" in text
    assert "quiet" not in text


def test_a_log_file_that_cannot_be_is_refused(tmp_path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, what in (("folder", "folder is a folder"), ("file/a/log.txt", "file is a file, not a folder")):
        (problem,) = ConsoleOptions(console_log_file=tmp_path / name).problems()
        assert what in problem.what
        assert problem.where == "--console_log_file"
    for name in ("file", "folder/new/log.txt"):
        assert ConsoleOptions(console_log_file=tmp_path / name).problems() == []
    with read_only(tmp_path):
        (problem,) = bound_by_permissions(ConsoleOptions(console_log_file=tmp_path / "folder" / "log.txt").problems)
    assert problem.what.endswith("folder cannot be written to")


def test_plain_lines_are_for_the_screen(tmp_path) -> None:
    (notice,) = ConsoleOptions(console_log_file=tmp_path / "log.txt", console_log_simple=True).notices()
    assert notice == "without effect with --console_log_file: --console_log_simple"
    assert ConsoleOptions(console_log_simple=True).notices() == []


def test_the_file_of_the_log_tells_no_place(tmp_path) -> None:
    path = tmp_path / "run.txt"
    set_up_logging(ConsoleOptions(console_log_file=path))
    try:
        raise ValueError(f"at {tmp_path}/deep/place")
    except ValueError:
        logging.getLogger("x").exception("%s/images/01.png cannot be read", tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "ERROR 01.png cannot be read" in text
    assert "ValueError: at place" in text
    assert "test_runtime.py" in text
    assert str(tmp_path) not in text
    assert str(Path(__file__).parent) not in text


def test_log_lines_steer_no_terminal(tmp_path):
    set_up_logging(ConsoleOptions(console_log_file=str(tmp_path / "log")))
    logging.getLogger("x").warning("caption of %s", "a\x1b[31m\x9b.png\r")
    for handler in logging.getLogger().handlers:
        handler.flush()
    assert (tmp_path / "log").read_text().rstrip("\n").endswith(r"caption of a\x1b[31m\x9b.png\r")
