"""Hashes of whole files are those of hashlib, and remembered only while a file stays as it is."""

import hashlib
import os
from pathlib import Path

import pytest

from library.data import content_hashes as module
from library.data.content_hashes import content_hashes

LONG_AGO = 1_600_000_000


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_WORTH_KEEPING", 1)
    (tmp_path / "in").mkdir()
    found = [tmp_path / "in" / f"{number}.bin" for number in range(5)]
    for number, path in enumerate(found):
        path.write_bytes(bytes([number]) * 3_000_000)
        os.utime(path, (LONG_AGO, LONG_AGO))
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    hash_of = module._hash

    def noted(path: Path) -> str:
        names.append(path.name)
        return hash_of(path)

    monkeypatch.setattr(module, "_hash", noted)
    return names


def expected(paths: list[Path]) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_nothing_is_read_twice_and_what_changed_is(files: list[Path], read: list[str]) -> None:
    assert content_hashes(files) == expected(files)
    assert sorted(read) == [path.name for path in files]
    read.clear()
    assert content_hashes(files) == expected(files)
    assert read == []
    files[3].write_bytes(b"other")
    assert content_hashes(files[2:]) == expected(files[2:])
    assert read == ["3.bin"]
    read.clear()
    # It was changed a moment ago, and may change again within the resolution of the clock.
    assert content_hashes(files) == expected(files)
    assert read == ["3.bin"]


def test_a_file_of_the_same_size_and_another_time_is_read(files: list[Path], read: list[str]) -> None:
    content_hashes(files)
    read.clear()
    files[0].write_bytes(b"x" * 3_000_000)
    os.utime(files[0], (LONG_AGO + 1, LONG_AGO + 1))
    assert content_hashes(files) == expected(files)
    assert read == ["0.bin"]


def test_what_cannot_be_read_has_no_hash(files: list[Path], tmp_path: Path) -> None:
    assert content_hashes([tmp_path / "missing", tmp_path / "in"]) == {tmp_path / "missing": "", tmp_path / "in": ""}
    assert content_hashes([]) == {}


def test_small_folders_are_not_remembered(files: list[Path], read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH_KEEPING", 1 << 40)
    content_hashes(files)
    read.clear()
    content_hashes(files)
    assert len(read) == 5
