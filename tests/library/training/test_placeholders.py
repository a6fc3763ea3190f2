"""Paths become names, and names paths again."""

from pathlib import Path

import pytest

from library.training.placeholders import Placeholders, filled_in


@pytest.fixture
def names(tmp_path, monkeypatch):
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home" / "me")
    monkeypatch.chdir(tmp_path / "here")
    return Placeholders()


def test_a_file_has_one_name_and_two_files_of_a_name_have_two(names, tmp_path):
    assert names.of("/models/sd.safetensors", "--a") == "map:sd.safetensors"
    assert names.of("/other/sd.safetensors", "--b") == "map:sd.safetensors-2"
    assert names.of("/third/sd.safetensors", "--b") == "map:sd.safetensors-3"
    assert names.of("/models/x/../sd.safetensors", "--c") == "map:sd.safetensors"
    assert names.of(".", "--d") == "map:folder"
    assert [one.uses for one in names][0] == ["--a", "--c"]
    assert names.of("data", "--e") == names.of(str(tmp_path / "here" / "data"), "--f") == "map:data"


@pytest.mark.parametrize(
    ("written", "kept"),
    [("data", "data"), ("data/../data", None), ("../here/data", None), ("/data", None), ("~/data", None)],
)
def test_only_relative_places_are_told(written, kept, names):
    names.of(written, "--a")
    assert [one.kept for one in names] == [kept]


def test_below_the_folder_of_homes_nothing_is_told(names, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    names.of("me/data", "--a")
    assert [one.kept for one in names] == [None]


def test_a_place_beside_the_data_set_file_is_found(names, tmp_path):
    (tmp_path / "here" / "sets" / "images").mkdir(parents=True)
    names.of("images", "image_dir", beside=Path("sets"))
    names.of("data", "image_dir", beside=Path("sets"))
    assert [one.kept for one in names] == ["sets/images", "data"]


def test_names_are_filled_in_wherever_they_stand():
    told = {"a": "map:x", "b": ["init=map:y", "map:x", 3, True, None], "c": "map:z and x", "d": "no map:x"}
    assert filled_in(told, {"x": "/1", "y": "/2"}) == {
        "a": "/1",
        "b": ["init=/2", "/1", 3, True, None],
        "c": "map:z and x",
        "d": "no map:x",
    }
