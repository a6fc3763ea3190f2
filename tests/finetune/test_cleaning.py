"""Captions and tags tidied up, against recorded values."""

import json
from pathlib import Path

import pytest

from finetune.clean_captions_and_tags import main
from finetune.cleaning import clean_caption, clean_tags
from library.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "clean_captions_tags.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["tags"], ids=lambda case: case["input"])
def test_tags_are_cleaned_as_recorded(case: dict[str, str]) -> None:
    assert clean_tags(case["input"]) == case["output"]


@pytest.mark.parametrize("case", GOLDEN["captions"], ids=lambda case: case["input"])
def test_captions_are_cleaned_as_recorded(case: dict[str, str]) -> None:
    assert clean_caption(case["input"]) == case["output"]


def test_cleaning_twice_is_cleaning_once() -> None:
    for case in GOLDEN["tags"]:
        assert clean_tags(case["output"]) == case["output"]
    for case in GOLDEN["captions"]:
        assert clean_caption(case["output"]) == case["output"]


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


ENTRIES = {
    "a": {"tags": "1girl, long_hair, rating:safe", "caption": "a woman", "train_resolution": [64, 64], "mine": [1]},
    "b": {"caption": "a cat"},
}


def test_every_other_field_stays(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.json", ENTRIES), tmp_path / "out.json"
    before = source.read_bytes()
    assert main([str(source), str(target)]) == 0
    assert json.loads(target.read_text()) == {
        "a": {"tags": "1girl, long hair", "caption": "a girl", "train_resolution": [64, 64], "mine": [1]},
        "b": {"caption": "a cat"},
    }
    assert source.read_bytes() == before
    assert main([str(source), str(source)]) == 0
    assert source.read_bytes() == target.read_bytes()


def test_the_old_call_with_a_folder_is_taken(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target = written(tmp_path / "in.json", ENTRIES), tmp_path / "out.json"
    assert main(["train_data", str(source), str(target)]) == 0
    assert "'train_data' is not used" in capfd.readouterr().err
    assert target.exists()


def test_a_dry_run_shows_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = written(tmp_path / "in.json", ENTRIES), tmp_path / "out.json"
    assert main([str(source), str(target), "--dry_run"]) == 0
    assert '~ a  caption: "a woman" -> "a girl"' in capsys.readouterr().out.splitlines()
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ('{"a": 1}', "an entry must be an object"),
        ('{"a": {"tags": ["x"]}}', "tags must be text"),
    ],
)
def test_a_broken_file_is_refused_and_nothing_written(tmp_path: Path, content: str, message: str) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(content)
    target.write_text("mine")
    with pytest.raises(UserError, match=message):
        main([str(source), str(target)])
    assert (source.read_text(), target.read_text()) == (content, "mine")


@pytest.mark.parametrize("given", [[], ["in.json"], ["a", "b", "c", "d"], ["missing.json", "out.json"]])
def test_a_wrong_call_is_refused(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        main(given)
    assert not list(tmp_path.iterdir())
