"""The time of day is set by years, forwards and backwards, while a run goes on."""

import html
import itertools
import math
import re
import time
from pathlib import Path

import pytest

from tests.faults.runs import RESULT, arguments, train
from tests.scripts.runs import read_losses, read_scalars

YEARS = 365.25 * 86400


def test_the_time_of_day_changes_nothing_but_dates(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
    more = ["--save_every_n_steps=1", "--save_state", "--sample_every_n_steps=1", f"--sample_prompts={prompts}"]
    given = arguments(model, tmp_path, *more)
    plain = train(tmp_path / "plain", *given)
    capfd.readouterr()
    real, jumps = time.time, itertools.cycle((0, 20 * YEARS, -10 * YEARS))
    monkeypatch.setattr("time.time", lambda: real() + next(jumps))
    monkeypatch.setattr("tqdm.std.time", time.time)
    run = train(tmp_path / "out", *given)
    assert run.code == 0
    assert run.tensor_hash(RESULT) == plain.tensor_hash(RESULT)
    # Names differ in their dates alone, of which no two previews share one.
    dated = re.compile(r"\d{14}|tfevents.*")
    assert sorted(dated.sub("", name) for name in run.files) == sorted(dated.sub("", name) for name in plain.files)
    assert read_losses(run.folder / "log") == plain.losses
    for tag in ("speed/images_per_second", "speed/seconds_per_step"):
        assert all(0 < value < 1000 and math.isfinite(value) for value in read_scalars(run.folder / "log", tag))
    report = html.unescape((run.folder / "thing-report.html").read_text(encoding="utf-8"))
    assert re.search(r"All 4 of 4 steps were done, in \d+ s", report)
    shown = re.findall(r"/4 \[([^<]*)<", capfd.readouterr().err)
    assert shown
    assert all(re.fullmatch(r"00:\d\d", elapsed) for elapsed in shown)
