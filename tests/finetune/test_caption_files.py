import logging
import os

import pytest

from finetune import metadata_files
from finetune.caption_files import has_text, text_file, to_write
from library.errors import UserError


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "a.png", "b.tar.png", "ü.png")]
    for path in paths:
        path.touch()
    return paths


def test_only_the_last_suffix_is_replaced(tmp_path):
    assert text_file(tmp_path / "b.tar.png", ".txt") == tmp_path / "b.tar.txt"


def test_images_of_one_name_have_one_text_file_made_from_the_first(images, caplog):
    with caplog.at_level(logging.WARNING):
        assert to_write(images, ".txt", skip_existing=False) == [images[0], *images[2:]]
    assert "a.png" in caplog.text
    assert "made from the other" in caplog.text


def test_what_is_there_is_made_anew_and_said_so(images, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("old")
    with caplog.at_level(logging.INFO):
        assert len(to_write(images, ".txt", skip_existing=False)) == 3
    assert "1 .txt files exist and are made anew (--skip_existing keeps them)" in caplog.text


def test_existing_texts_are_left_out_but_not_empty_ones(images, tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "ü.txt").write_text("\n")
    assert to_write(images, ".txt", skip_existing=True) == images[2:]


def test_a_text_file_that_is_a_folder_is_a_mistake(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match=r"cannot read a\.txt"):
        has_text(tmp_path / "a.txt")


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(images, tmp_path, monkeypatch):
    # The administrator may write anywhere, so the system's answer is replaced.
    monkeypatch.setattr(metadata_files.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match="may be written to"):
        to_write(images, ".txt", skip_existing=False)


def test_names_that_are_too_long_for_a_text_file_are_all_told_before_the_work(images, tmp_path):
    long = [tmp_path / f"{letter * 248}.png" for letter in "xy"]
    for path in long:
        path.touch()
    with pytest.raises(UserError, match="so long that a text file cannot have it") as caught:
        to_write([*images, *long], ".caption", skip_existing=True)
    assert [problem.where for problem in caught.value.problems] == [str(path) for path in long]
    assert to_write([*images, *long], ".txt", skip_existing=True)[-2:] == long
