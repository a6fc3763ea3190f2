"""A folder for the results that cannot be written to, from the start or from the middle of a run on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from library.errors import UserError
from tests.faults.disks import SmallDisk
from tests.faults.runs import RESULT, after_steps, alone, arguments, names, train
from tests.scripts.runs import Run, tensor_hash


def test_a_read_only_folder_is_told_before_anything_is_loaded(model: Path, disk: SmallDisk, tmp_path: Path) -> None:
    given = arguments(model, tmp_path)
    disk.allow_writing(allowed=False)
    with pytest.raises(UserError) as caught:
        train(disk.path / "out", *given, f"--logging_dir={disk.path / 'log'}")
    assert {problem.where for problem in caught.value.problems} == {"--output_dir", "--logging_dir"}
    assert not disk.files


def test_a_folder_that_becomes_read_only(
    model: Path, plain: Callable[[int], Run], disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model, tmp_path, "--save_every_n_steps=1", "--save_state", "--no_report")
    places = alone(tmp_path / "places", monkeypatch)
    after_steps(monkeypatch, {2: partial(disk.allow_writing, allowed=False)})
    with pytest.raises(UserError, match="cannot write thing.safetensors: Read-only file system; it is in"):
        train(disk.path / "out", *given, f"--logging_dir={tmp_path / 'log'}")
    assert names(disk.path / "out") == {"thing-step00000001.safetensors", "thing-step00000001-state"}
    (rescued,) = places.glob("*/rescued-*")
    assert tensor_hash(rescued / RESULT) == plain(4).tensor_hash(RESULT)
    monkeypatch.undo()
    disk.allow_writing(allowed=True)
    state = disk.path / "out" / "thing-step00000001-state"
    run = train(disk.path / "out", *given, f"--resume={state}", f"--logging_dir={tmp_path / 'log'}")
    assert run.tensor_hash(RESULT) == plain(4).tensor_hash(RESULT)


def test_a_folder_that_becomes_writable_again(
    model: Path, disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model, tmp_path, "--save_every_n_steps=1", "--no_report", steps=3)
    after_steps(
        monkeypatch,
        {2: partial(disk.allow_writing, allowed=False), 3: partial(disk.allow_writing, allowed=True)},
    )
    run = train(disk.path / "out", *given, f"--logging_dir={tmp_path / 'log'}")
    assert run.code == 0
    assert names(run.folder) == {"thing-step00000001.safetensors", "thing-step00000003.safetensors", RESULT}
