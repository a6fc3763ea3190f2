"""``metadata_cache.json``: written, compared, written anew, and never believed."""

import json
import os
from pathlib import Path

import pytest

from library.data.info_file import NAME, info_of, keep_info
from library.data.records import scan
from tests.library.data.reading import errors, make_images, read, write

TOML = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{}'\ncaption_extension = '.txt'\nclass_tokens = 'dog'\n"


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / "images", 3, size=(512, 512))
    (tmp_path / "images" / "0.txt").write_text("a café\nmore\n", encoding="utf-8")
    return tmp_path / "images"


@pytest.fixture
def spec(tmp_path, folder):
    """The set as a file beside the folder describes it: its place is not the way it is written."""
    path = write(tmp_path, TOML.format("./images") + "cache_info = true\n")
    spec, findings = read(path)
    assert not findings
    return spec


def content(folder):
    return json.loads((folder / NAME).read_text(encoding="utf-8"))


def told(spec):
    """What a start says of the file, and the captions that it trains on."""
    records, findings = scan(spec)
    return [finding for finding in findings if NAME in finding.what], [record.caption for record in records]


EXPECTED = {
    "./images/0.png": {"caption": "a café", "resolution": [512, 512]},
    "./images/1.png": {"caption": "dog", "resolution": [512, 512]},
    "./images/2.png": {"caption": "dog", "resolution": [512, 512]},
}


def test_it_is_written_in_the_form_and_spelling_that_others_read(spec, folder):
    findings, _ = told(spec)
    assert not findings
    assert content(folder) == EXPECTED
    before = (folder / NAME).stat().st_mtime_ns
    assert not told(spec)[0]
    assert (folder / NAME).stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "0.txt", "1.png", "2.png", NAME]


def test_what_is_out_of_date_is_counted_once_and_not_trained_on(spec, folder):
    told(spec)
    stale = content(folder)
    stale["./images/0.png"] = {"caption": "an old caption", "resolution": [256, 512]}
    stale["./images/1.png"] = None
    stale["elsewhere/3.png"] = stale.pop("./images/2.png")
    (folder / NAME).write_text(json.dumps(stale), encoding="utf-8")
    (finding,), captions = told(spec)
    assert finding.severity == "warning"
    for count in ("2 captions that", "2 sizes that", "1 images that were not", "1 paths that lead to no image"):
        assert count in finding.what
    assert captions == ["a café", "dog", "dog"]
    assert content(folder) == EXPECTED
    assert not told(spec)[0]


def test_a_changed_caption_file_is_noticed(spec, folder):
    told(spec)
    (folder / "1.txt").write_text("a new caption", encoding="utf-8")
    (finding,), captions = told(spec)
    assert "anew: 1 captions that have changed" in finding.what
    assert captions[1] == content(folder)["./images/1.png"]["caption"] == "a new caption"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b'{"a": \n', "no JSON (Expecting value, line 2)"),
        (b"[]", "no JSON object"),
        (b'"\xff"', "not UTF-8 (byte 1)"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_file_is_told_and_left_as_it_is(spec, folder, damage, said):
    (folder / NAME).write_bytes(damage)
    (finding,), captions = told(spec)
    assert finding.severity == "warning"
    assert said in finding.what
    assert (folder / NAME).read_bytes() == damage
    assert captions[0] == "a café"


def test_it_is_not_written_unless_asked_for(tmp_path, folder):
    scan(read(write(tmp_path, TOML.format("images")))[0])
    assert not (folder / NAME).exists()


def test_two_sets_of_one_folder_share_the_file(tmp_path, folder):
    again = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\ncache_info = true\n"
    path = write(tmp_path, f"[general]\ncache_info = true\n{TOML.format('images')}{again}")
    for _ in range(2):
        assert not told(read(path)[0])[0]
    assert content(folder)["images/0.png"]["caption"] == "a café"


def test_only_the_first_process_writes(spec, folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    told(spec)
    assert not (folder / NAME).exists()


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    (finding,) = keep_info(tmp_path, info_of("images", [("a.png", "words", (8, 6))]))
    assert finding.severity == "warning"
    assert "is not written" in finding.what
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_text_survive(tmp_path):
    expected = info_of("images", [("a\udcff.png", "größe", (8, 6))])
    assert not keep_info(tmp_path, expected)
    assert content(tmp_path) == expected
    assert not keep_info(tmp_path, expected)


def test_beside_a_metadata_file_it_is_told_to_have_no_effect(tmp_path, folder):
    write(tmp_path, '{"0": {"caption": "c"}}', "meta.json")
    text = "[general]\ncache_info = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\n"
    spec, findings = read(write(tmp_path, text + "metadata_file = 'meta.json'\n"))
    (finding,) = findings
    assert not errors(findings)
    assert "cache_info has no effect on 'meta.json'" in finding.what
    scan(spec)
    assert not (folder / NAME).exists()


def test_paths_begin_as_the_folder_is_written():
    assert list(info_of("images/", [("a.png", "", (1, 1))])) == ["images/a.png"]
    assert list(info_of(str(Path("sets") / "10_dog"), [("a.png", "", (1, 1))])) == [
        os.path.join("sets/10_dog", "a.png")
    ]


def test_no_folder_is_made_for_it(tmp_path):
    path = write(tmp_path, TOML.format("./nowhere") + "cache_info = true\n")
    scan(read(path)[0])
    assert not (tmp_path / "nowhere").exists()
    assert not Path("nowhere").exists()
