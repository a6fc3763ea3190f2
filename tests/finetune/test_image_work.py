"""Reading ahead, batches, bad images and stops, with work that needs no model."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from finetune.image_work import EXIT_BAD_IMAGES, BadImage, ImageWork, report
from finetune.processes import Processes
from library.errors import UserError

PATHS = [Path(f"{number:03d}.png") for number in range(50)]


def number_of(path):
    return int(path.stem)


def work(written, **changes):
    settings = {
        "read": number_of,
        "infer": lambda paths, numbers: [number * 2 for number in numbers],
        "write": lambda path, result: written.append((path, result)),
    }
    return ImageWork(**(settings | changes))


@pytest.mark.parametrize("threads", [0, 1, 5, None])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_every_image_is_done_once_in_order(threads, batch_size):
    written, sizes = [], []

    def infer(paths, numbers):
        assert [number_of(path) for path in paths] == list(numbers)
        sizes.append(len(paths))
        return [number * 2 for number in numbers]

    bad = work(written, infer=infer, threads=threads, batch_size=batch_size).run(PATHS)
    assert bad == []
    assert written == [(path, 2 * number_of(path)) for path in PATHS]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sum(sizes) == 50


@pytest.mark.parametrize("threads", [0, 3])
def test_bad_images_are_left_out_and_batches_stay_full(threads):
    written, sizes = [], []

    def read(path):
        if number_of(path) % 5 == 0:
            raise UserError("broken", where=str(path))
        return number_of(path)

    def infer(paths, numbers):
        sizes.append(len(paths))
        return numbers

    bad = work(written, read=read, infer=infer, threads=threads, batch_size=8).run(PATHS)
    assert bad == [BadImage(f"{number:03d}.png", "broken") for number in range(0, 50, 5)]
    assert [path for path, _ in written] == [path for path in PATHS if number_of(path) % 5]
    assert sizes == [8] * 5


def test_a_defect_in_reading_is_not_taken_for_a_bad_image():
    with pytest.raises(ZeroDivisionError):
        work([], read=lambda path: 1 // 0).run(PATHS)


def test_few_images_are_in_memory_at_a_time():
    lock, state = threading.Lock(), {"now": 0, "most": 0}

    def read(path):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        return number_of(path)

    def infer(paths, numbers):
        time.sleep(0.005)
        with lock:
            state["now"] -= len(paths)
        return numbers

    work([], read=read, infer=infer, threads=2, batch_size=4).run([Path(f"{n}.png") for n in range(200)])
    # The batch, what waits for the next one, and two for each thread.
    assert 8 <= state["most"] <= 4 + 4 + 2 * 2 + 1


def test_ctrl_c_keeps_what_is_inferred():
    written = []

    def infer(paths, numbers):
        if 20 in numbers:
            raise KeyboardInterrupt
        return numbers

    def write(path, result):
        time.sleep(0.002)
        written.append(result)

    with pytest.raises(KeyboardInterrupt):
        work(written, infer=infer, write=write, batch_size=4).run(PATHS)
    assert written == list(range(20))


def test_sigterm_stops_as_ctrl_c_does():
    written = []

    def infer(paths, numbers):
        if 8 in numbers:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return numbers

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        work(written, infer=infer, batch_size=4).run(PATHS)
    assert len(written) == 8
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_result_that_cannot_be_written_ends_the_work():
    calls = []

    def write(path, result):
        calls.append(path)
        raise UserError("disk full")

    def infer(paths, numbers):
        time.sleep(0.005)
        return numbers

    with pytest.raises(UserError, match="disk full"):
        work([], write=write, infer=infer).run(PATHS)
    assert len(calls) < 50


def test_the_last_result_that_cannot_be_written_counts_too():
    def write(path, result):
        if path == PATHS[-1]:
            raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        work([], write=write).run(PATHS)


def test_the_report_names_bad_images_and_the_exit_code_tells(capsys):
    assert report([], done=3, processes=Processes()) == 0
    assert capsys.readouterr().err == ""
    bad = [BadImage("b.png", "truncated"), BadImage("a.png", "empty")]
    assert report(bad, done=3, processes=Processes()) == EXIT_BAD_IMAGES
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2 images could not be read")
    assert lines[1:] == ["  a.png: empty", "  b.png: truncated"]


def test_processes_share_images_without_gaps_or_repeats():
    shares = [Processes(rank=rank, world=3).share(PATHS) for rank in range(3)]
    assert sorted(path for share in shares for path in share) == PATHS
    assert {len(share) for share in shares} == {16, 17}
