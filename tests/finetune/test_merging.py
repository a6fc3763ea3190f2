"""Captions and tags gathered in a metadata file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import merge_captions_to_metadata, merge_dd_tags_to_metadata
from library.data.metadata import read_metadata
from library.errors import UserError
from tests.scripts.runs import write_images

ROOT = Path(__file__).parents[2]


def folder(tmp_path: Path, count: int = 3) -> Path:
    """Images with a caption and tags each, as captioning tools and DeepDanbooru write them."""
    images = write_images(tmp_path / "train_data", count)
    for path in sorted(images.glob("*.png")):
        path.with_suffix(".caption").write_text(f"a café, {path.stem}\n", encoding="utf-8")
        path.with_suffix(".txt").write_text("long_hair, rating:safe", encoding="utf-8")
    return images


def captions(*given: object) -> int:
    return merge_captions_to_metadata.main([str(word) for word in given])


def tags(*given: object) -> int:
    return merge_dd_tags_to_metadata.main([str(word) for word in given])


def content(path: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_documented_file(tmp_path: Path) -> None:
    """Keys are names without suffix, two spaces a level, letters beyond ASCII escaped, line ends in the text kept."""
    images = folder(tmp_path, 1)
    (images / "00.caption").write_text("\ufeff a café\nsecond \n", encoding="utf-8")
    out = tmp_path / "meta.json"
    assert captions(images, out) == 0
    assert tags(images, out) == 0
    assert out.read_text() == (
        '{\n  "00": {\n    "caption": "a caf\\u00e9\\nsecond",\n    "tags": "long_hair, rating:safe"\n  }\n}\n'
    )
    assert read_metadata(out)[1] == []


def test_keys_are_paths_as_they_were_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path)
    (images / "sub").mkdir()
    for suffix in (".png", ".caption"):
        (images / f"00{suffix}").rename(images / "sub" / f"00{suffix}")
    monkeypatch.chdir(tmp_path)
    assert captions("--full_path", "train_data", "meta.json") == 0
    assert list(content(tmp_path / "meta.json")) == ["train_data/01.png", "train_data/02.png"]
    assert captions("--full_path", "--recursive", images, "deep.json") == 0
    assert list(content(tmp_path / "deep.json")) == [str(images / name) for name in ("01.png", "02.png", "sub/00.png")]
    with pytest.raises(UserError, match="needs --full_path"):
        captions("--recursive", "train_data", "meta.json")


def test_an_existing_target_is_extended_and_another_source_replaces_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out, source = folder(tmp_path), tmp_path / "out.json", tmp_path / "in.json"
    out.write_text(json.dumps({"old": {"caption": "x", "mine": 1}}))
    source.write_text(json.dumps({"00": {"tags": "t", "caption": "before"}}))
    captions(images, out)
    assert list(content(out)) == ["old", "00", "01", "02"]
    assert content(out)["old"] == {"caption": "x", "mine": 1}
    capfd.readouterr()
    captions(images, "--in_json", source, out)
    told = capfd.readouterr().err
    assert content(out)["00"] == {"tags": "t", "caption": "a café, 00"}
    assert "caption changed in 1 entries: '00'" in told
    assert "out.json exists and is replaced; 3 of its 4 entries stay" in told
    assert "no longer in it: 'old'" in told
    captions(images, "--in_json", source, source)
    assert source.read_bytes() == out.read_bytes()


def test_json_lines_are_read_and_written(tmp_path: Path) -> None:
    images, out = folder(tmp_path, 2), tmp_path / "out.jsonl"
    captions("--full_path", images, out)
    tags("--full_path", images, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image_path"] for line in lines] == [str(images / "00.png"), str(images / "01.png")]
    assert lines[1] | {"image_path": ""} == {
        "image_path": "",
        "caption": "a café, 01",
        "tags": "long_hair, rating:safe",
    }


def test_the_extension_is_chosen(tmp_path: Path) -> None:
    images, out = folder(tmp_path, 1), tmp_path / "out.json"
    captions("--caption_extention", "txt", images, out)
    assert content(out) == {"00": {"caption": "long_hair, rating:safe"}}
    (images / "00.TAGS").write_text("upper")
    tags("--caption_extension=.tags", images, out)
    assert content(out)["00"]["tags"] == "upper"


def test_letters_of_every_language_are_kept_and_names_without_any_refused(tmp_path: Path) -> None:
    images, out = folder(tmp_path, 1), tmp_path / "out.json"
    for suffix in (".png", ".caption"):
        (images / f"00{suffix}").rename(images / f"図 é{suffix}")
    captions("--full_path", images, out)
    assert out.read_bytes().isascii()
    assert list(content(out)) == [str(images / "図 é.png")]
    before = out.read_bytes()
    wrong = os.fsencode(images) + b"/\xff.png"
    with open(wrong, "wb") as file:
        file.write((images / "図 é.png").read_bytes())
    with pytest.raises(UserError, match="the file name is no text"):
        captions("--full_path", images, out)
    assert out.read_bytes() == before


def test_missing_files_are_listed_and_skipped_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, out = folder(tmp_path), tmp_path / "out.json"
    (images / "01.caption").unlink()
    assert captions(images, out) == 0
    assert list(content(out)) == ["00", "02"]
    assert f"no .caption file, skipped: {images / '01.png'}" in capfd.readouterr().err
    before = out.read_bytes()
    with pytest.raises(UserError) as caught:
        captions(images, out, "--missing_files=refuse")
    assert [problem.where for problem in caught.value.problems] == [str(images / "01.png")]
    assert out.read_bytes() == before


def test_a_wrong_extension_is_told(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2)
    with pytest.raises(UserError, match="has a .caption file") as caught:
        captions(images, tmp_path / "out.json")
    assert caught.value.problems[0].remedy == "There are 2 .txt files: did you mean --caption_extension=.txt?"
    assert not (tmp_path / "out.json").exists()


def test_a_file_that_cannot_be_read_is_named_and_the_others_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = folder(tmp_path), tmp_path / "out.json"
    (images / "01.caption").write_bytes("ä".encode("latin-1"))
    assert captions(images, out) == 1
    assert list(content(out)) == ["00", "02"]
    assert "01.caption: not UTF-8 at byte 0" in capfd.readouterr().err


def test_a_dry_run_shows_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = folder(tmp_path, 2), tmp_path / "out.json"
    out.write_text(json.dumps({"00": {"caption": "before"}}))
    before = out.read_bytes()
    assert captions(images, out, "--dry_run") == 0
    assert capsys.readouterr().out.splitlines() == [
        '~ 00  caption: "before" -> "a café, 00"',
        '+ 01  caption: "a café, 01"',
    ]
    assert out.read_bytes() == before


def test_images_that_share_a_name_or_have_two_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, out = folder(tmp_path, 2), tmp_path / "out.json"
    (images / "00.jpg").write_bytes((images / "00.png").read_bytes())
    captions(images, out)
    assert "1 names belong to several images, which share one entry: '00'" in capfd.readouterr().err
    tags("--full_path", images, out)
    assert "leave --full_path out, or images have two" in capfd.readouterr().err


@pytest.mark.parametrize("run", [captions, tags])
def test_a_folder_without_images_is_told(run: object, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "no images in the folder"), ("missing", "folder not found")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / name, tmp_path / "out.json")  # type: ignore[operator]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "b"}'])
def test_a_target_that_is_no_metadata_is_kept(text: str, tmp_path: Path) -> None:
    images, out, source = folder(tmp_path, 1), tmp_path / "out.json", tmp_path / "in.json"
    source.write_text("{}")
    out.write_text(text)
    for more in ([], ["--in_json", source]):
        with pytest.raises(UserError):
            captions(images, out, *more)
    assert out.read_text() == text


def test_a_target_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = folder(tmp_path, 1), tmp_path / "out.json"
    out.write_text("{}")
    # As for a user to whom the file is write-protected; the superuser is never refused.
    monkeypatch.setattr("finetune.metadata_files.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot write out.json"):
        captions(images, out)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is a folder"):
        captions(images, images)
    with pytest.raises(UserError, match="cannot write a.json"):
        captions(images, images / "00.png" / "a.json")
    assert out.read_text() == "{}"


def test_both_run_from_any_folder_and_say_the_exit_code(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    for name in ("merge_captions_to_metadata.py", "merge_dd_tags_to_metadata.py"):
        command = [sys.executable, name, "--full_path", str(tmp_path / "train_data"), str(tmp_path / "meta.json")]
        subprocess.run(command, check=True, cwd=ROOT / "finetune", timeout=60)
    assert set(content(tmp_path / "meta.json")[str(tmp_path / "train_data" / "00.png")]) == {"caption", "tags"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "finetune" / "merge_dd_tags_to_metadata.py"), "nowhere", "out.json"],
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "folder not found: 'nowhere'" in run.stderr
