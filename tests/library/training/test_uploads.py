"""The queue of uploads, with senders that fail as they are told."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from library.training.uploads import Patience, RefusedError, UnreachedError, Uploads, persistently

QUICK = Patience(first=0.01, longest=0.02, one=0.5, save=0.3, end=0.5)


class Sender:
    """Notes what it is given; fails by the number of the attempt, and waits at the gate."""

    def __init__(self, fails: Callable[[str, int], Exception | None] = lambda name, attempt: None) -> None:
        self.fails = fails
        self.attempts: Counter[str] = Counter()
        self.sent: list[tuple[str, bytes]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, path: Path) -> None:
        self.attempts[path.name] += 1
        assert self.gate.wait(5)
        failure = self.fails(path.name, self.attempts[path.name])
        if failure is not None:
            raise failure
        self.sent.append((path.name, path.read_bytes() if path.is_file() else b""))


def write(folder: Path, name: str, content: bytes = b"x") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_files_are_sent_in_order_while_training_goes_on(tmp_path: Path) -> None:
    send = Sender()
    send.gate.clear()
    uploads = Uploads(send, background=True, patience=QUICK)
    begun = time.monotonic()
    for number in range(5):
        uploads.add(write(tmp_path, f"{number}.bin"))
    assert time.monotonic() - begun < 0.2, "training has waited"
    send.gate.set()
    uploads.finish()
    assert [name for name, _ in send.sent] == [f"{number}.bin" for number in range(5)]
    assert not uploads.missing


def test_without_background_a_file_has_arrived_when_training_goes_on(tmp_path: Path) -> None:
    send = Sender(lambda name, attempt: UnreachedError("later") if attempt < 3 else None)
    uploads = Uploads(send, background=False, patience=QUICK)
    uploads.add(write(tmp_path, "a.bin"))
    assert names(uploads.arrived) == ["a.bin"]
    assert send.attempts["a.bin"] == 3


def test_training_waits_for_a_hub_that_hangs_only_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    send = Sender()
    send.gate.clear()
    uploads = Uploads(send, background=False, patience=QUICK)
    begun = time.monotonic()
    uploads.add(write(tmp_path, "a.bin"))
    between = time.monotonic()
    uploads.add(write(tmp_path, "b.bin"))
    assert QUICK.save <= between - begun
    assert time.monotonic() - between < QUICK.save / 2
    assert "still being uploaded" in caplog.text
    send.gate.set()
    uploads.finish()
    assert names(uploads.arrived) == ["a.bin", "b.bin"]


def test_waits_double_up_to_the_longest_and_end_with_the_time() -> None:
    class Clock(threading.Event):
        def __init__(self) -> None:
            super().__init__()
            self.waits: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            self.waits.append(timeout)
            return len(self.waits) == 7

    clock = Clock()
    asked = iter([0, 0, 0, 30, 0, 0, 0, 0])

    def fail() -> None:
        raise UnreachedError("no", next(asked))

    with pytest.raises(UnreachedError):
        persistently(fail, Patience(first=1, longest=10, one=100), clock)
    assert clock.waits == [1, 2, 4, 30, 10, 10, 10]
    with pytest.raises(UnreachedError):
        persistently(fail, Patience(first=200, one=100), clock)
    assert len(clock.waits) == 7, "it waited beyond its time"


@pytest.mark.parametrize("error", [RefusedError("the token is refused"), ValueError("a defect")])
def test_what_is_refused_is_not_tried_again_and_does_not_hold_up_others(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    send = Sender(lambda name, attempt: error if name == "a.bin" else None)
    uploads = Uploads(send, background=True, patience=QUICK)
    uploads.add(write(tmp_path, "a.bin"))
    uploads.add(write(tmp_path, "b.bin"))
    uploads.finish()
    assert send.attempts == {"a.bin": 1, "b.bin": 1}
    assert names(list(uploads.missing)) == ["a.bin"]
    assert "not uploaded" in caplog.text
    assert "a.bin" in caplog.text.splitlines()[-1]


def test_what_was_given_up_is_sent_once_something_arrives(tmp_path: Path) -> None:
    """Two uploads fail for all their time; then the way is free again."""
    free = threading.Event()
    send = Sender(lambda name, attempt: None if free.is_set() else UnreachedError("down"))
    uploads = Uploads(send, background=False, patience=Patience(first=0.01, longest=0.01, one=0.05, save=1, end=1))
    uploads.add(write(tmp_path, "a.bin"))
    uploads.add(write(tmp_path, "b.bin"))
    assert set(names(list(uploads.missing))) == {"a.bin", "b.bin"}
    free.set()
    uploads.add(write(tmp_path, "c.bin"))
    uploads.finish()
    assert names(uploads.arrived) == ["c.bin", "a.bin", "b.bin"]
    assert not uploads.missing


def test_the_end_waits_a_limited_time_and_names_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    send = Sender(lambda name, attempt: UnreachedError("status 503") if name != "0.bin" else None)
    uploads = Uploads(send, background=True, patience=Patience(first=0.01, longest=0.01, one=60, save=1, end=0.3))
    for number in range(3):
        uploads.add(write(tmp_path, f"{number}.bin"))
    begun = time.monotonic()
    uploads.finish()
    assert 0.3 <= time.monotonic() - begun < 3
    assert names(uploads.arrived) == ["0.bin"]
    assert {path.name: reason for path, reason in uploads.missing.items()} == {
        "1.bin": "status 503",
        "2.bin": "it was still on its way",
    }
    for name in ("1.bin", "2.bin"):
        assert f"{name} (" in caplog.text
    assert "waiting for uploads" in caplog.text


def test_ctrl_c_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Sender()
    send.gate.clear()
    uploads = Uploads(send, background=True, patience=Patience(end=60))
    uploads.add(write(tmp_path, "a.bin"))

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(uploads._changed, "wait", interrupted)
    uploads.finish()
    assert names(list(uploads.missing)) == ["a.bin"]
    send.gate.set()


def test_a_run_that_is_broken_off_does_not_wait_but_one_that_fails_does(tmp_path: Path) -> None:
    for error, arrived in ((KeyboardInterrupt(), []), (RuntimeError(), ["a.bin"])):
        send = Sender()
        send.gate.clear()
        uploads = Uploads(send, background=True, patience=QUICK)
        threading.Timer(0.1, send.gate.set).start()
        uploads.add(write(tmp_path, "a.bin"))
        with pytest.raises(type(error)), uploads:
            raise error
        assert names(uploads.arrived) == arrived
        send.gate.set()


def test_an_outdated_file_is_removed_when_it_has_arrived(tmp_path: Path) -> None:
    send = Sender()
    send.gate.clear()
    uploads = Uploads(send, background=True, patience=QUICK)
    files = [write(tmp_path, f"{number}.bin", bytes([number])) for number in range(3)]
    for path in files:
        uploads.add(path)
    assert uploads.keeps(files[0], Path.unlink)
    assert uploads.keeps(files[1], Path.unlink)
    assert all(path.exists() for path in files)
    send.gate.set()
    uploads.finish()
    assert [path.exists() for path in files] == [False, False, True]
    assert send.sent == [(f"{number}.bin", bytes([number])) for number in range(3)]
    assert not uploads.keeps(files[2], Path.unlink), "nothing waits for it"


def test_kept_files_take_limited_space_and_the_oldest_goes_first(tmp_path: Path) -> None:
    send = Sender()
    send.gate.clear()
    uploads = Uploads(send, background=True, patience=QUICK, held_bytes=250)
    files = [write(tmp_path, f"{number}.bin", bytes(100)) for number in range(4)]
    for path in files:
        uploads.add(path)
    while not send.attempts:
        time.sleep(0.01)
    for path in files[:3]:
        assert uploads.keeps(path, Path.unlink)
    assert [path.exists() for path in files] == [True, False, True, True], "the one being sent stays"
    send.gate.set()
    uploads.finish()
    assert names(uploads.arrived) == ["0.bin", "2.bin", "3.bin"]
    assert names(list(uploads.missing)) == ["1.bin"]
    assert "save space" in uploads.missing[files[1]]


def test_a_file_saved_anew_while_it_waits_is_sent_once(tmp_path: Path) -> None:
    send = Sender()
    send.gate.clear()
    uploads = Uploads(send, background=True, patience=QUICK)
    uploads.add(write(tmp_path, "first.bin"))
    uploads.add(write(tmp_path, "a.bin", b"old"))
    while not send.attempts:
        time.sleep(0.01)
    uploads.add(write(tmp_path, "a.bin", b"new"))
    send.gate.set()
    uploads.finish()
    assert send.sent == [("first.bin", b"x"), ("a.bin", b"new")]
    assert not uploads.missing
