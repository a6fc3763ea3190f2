"""A disk of the log that is full, gone or does not answer: the run goes on and says so, once and at its end."""

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from library.messages import kept_messages
from library.training.log_thread import InBackground
from tests.faults.disks import SmallDisk
from tests.faults.runs import RESULT, after_steps, arguments, train
from tests.scripts.runs import Run

STEPS = 16


def said() -> list[str]:
    return [message.text for message in kept_messages() if "log" in message.text and "TensorBoard" in message.text]


@pytest.mark.parametrize("event", ["full", "gone"])
def test_the_run_goes_on(
    event: str,
    model: Path,
    plain: Callable[[int], Run],
    disk: SmallDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # More than what is left of the page that the file ends in.
    given = arguments(model, tmp_path, steps=STEPS)
    whole = plain(STEPS)
    logs = disk.path / "logs"

    def happen() -> None:
        if event == "full":
            disk.leave(0)
        else:
            shutil.rmtree(logs)

    after_steps(monkeypatch, {2: happen})
    run = train(tmp_path / "out", *given, f"--logging_dir={logs}")
    assert run.code == 0
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    reason = "No space left on device" if event == "full" else "its folder is gone"
    assert said()
    assert all(reason in text for text in said())
    assert len(said()) <= 2
    assert said()[-1].startswith(("the log in TensorBoard ends after step", "the end of the log is missing"))


def test_a_disk_that_does_not_answer_holds_up_nothing(
    model: Path, plain: Callable[[int], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing blocks from the second step on, as on a network drive that is gone."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    answers = threading.Event()
    blocked = threading.Event()
    original = RecordWriter.write

    def write(self: Any, content: bytes) -> None:
        if blocked.is_set():
            answers.wait(60)
        original(self, content)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr("library.training.tracking.InBackground", partial(InBackground, patience=0.5))
    given = arguments(model, tmp_path, steps=STEPS)
    whole = plain(STEPS)
    after_steps(monkeypatch, {2: blocked.set})
    run = train(tmp_path / "out", *given)
    answers.set()
    assert run.code == 0
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    assert said() == ["the end of the log is missing in TensorBoard: nothing was written for 0.5 seconds"]


class Stuck:
    """Takes the first figures, and nothing after them."""

    name = "a log"

    def __init__(self) -> None:
        self.free = threading.Event()
        self.taken: list[int] = []

    def add(self, figures: Mapping[str, float], *, at: int, step: int) -> None:
        if self.taken:
            self.free.wait(30)
        self.taken.append(step)

    def add_image(self, number: int, image: Any, *, prompt: str, step: int) -> None:
        raise AssertionError("no previews here")

    def close(self, *, failed: bool) -> None:
        self.taken.append(-1)


def test_what_waits_is_bounded_and_giving_up_takes_no_time() -> None:
    stuck = Stuck()
    target = InBackground(stuck, most_waiting=5, patience=20)

    def fill() -> None:
        for step in range(20):
            target.add({}, at=step, step=step)

    with pytest.raises(TimeoutError, match="does not keep up"):
        fill()
    began = time.monotonic()
    target.close(failed=False)
    assert time.monotonic() - began < 10
    stuck.free.set()


def test_what_waits_at_the_end_is_written() -> None:
    stuck = Stuck()
    target = InBackground(stuck, most_waiting=50, patience=20)
    for step in range(20):
        target.add({}, at=step, step=step)
    stuck.free.set()
    target.close(failed=False)
    assert stuck.taken == [*range(20), -1]
