"""Each file that cannot be read is told what is wrong with it, and what helps."""

import os
from pathlib import Path

import pytest

from library.data import folder_files
from library.data.caption_files import UnreadableCaptionError
from library.data.image_headers import UnreadableImageError
from library.data.records import scan
from library.data.unreadable import unreadable_caption, unreadable_image
from tests.library.data.reading import errors, make_images
from tests.library.data.small_set import make_spec, make_subset


def findings_of(folder):
    return errors(scan(make_spec(make_subset(folder, caption_extension=".txt")))[1])


def test_links_that_lead_nowhere(tmp_path):
    make_images(tmp_path, 2)
    (tmp_path / "0.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    image, caption = sorted(findings_of(tmp_path), key=lambda finding: finding.where, reverse=True)
    assert image.what == "the image cannot be read: it is a link, and the file it leads to is missing"
    assert caption.what == "the caption cannot be read: it is a link, and the file it leads to is missing"
    assert image.remedy == caption.remedy == "Put that file back, or remove the link."
    assert [Path(finding.where).name for finding in (image, caption)] == ["2.png", "0.txt"]


def test_folders_called_like_files(tmp_path):
    make_images(tmp_path, 1)
    (tmp_path / "0.txt").mkdir()
    (tmp_path / "1.png").mkdir()
    found = findings_of(tmp_path)
    assert len(found) == 2
    assert all("is a folder" in finding.what and "Rename" in finding.remedy for finding in found)


def test_another_encoding_and_a_damaged_image(tmp_path):
    make_images(tmp_path, 1)
    (tmp_path / "0.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "1.png").write_bytes(b"")
    remedies = {Path(finding.where).name: finding.remedy for finding in findings_of(tmp_path)}
    assert "UTF-8" in remedies["0.txt"]
    assert "whole copy" in remedies["1.png"]


def test_no_permission(tmp_path, monkeypatch):
    make_images(tmp_path, 1)
    (tmp_path / "0.txt").write_text("words")

    def refuse(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(folder_files, "read_text", refuse)
    (finding,) = findings_of(tmp_path)
    assert finding.what == "the caption cannot be read: you may not read it"
    assert "permissions" in finding.remedy


@pytest.mark.parametrize(
    ("problem", "what", "remedy"),
    [
        (FileNotFoundError(2, "No such file"), "gone", "Put it back"),
        (OSError(5, "Input/output error"), "Input/output error", "disk"),
        (UnreadableCaptionError("not UTF-8 at byte 3"), "byte 3", "UTF-8"),
    ],
)
def test_what_a_caption_is_told(problem, what, remedy):
    finding = unreadable_caption(Path("a.txt"), problem)
    assert what in finding.what
    assert remedy in finding.remedy


def test_a_decoder_without_a_number_of_the_system_means_damage():
    problem = UnreadableImageError("broken data stream")
    problem.__cause__ = OSError("broken data stream")
    finding = unreadable_image(Path("a.png"), problem)
    assert finding.what.endswith("broken data stream")
    assert "whole copy" in finding.remedy


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_and_files_without_an_end_do_not_stop_the_scan(tmp_path):
    """An archive can hold both."""
    make_images(tmp_path, 2)
    os.mkfifo(tmp_path / "0.txt")
    (tmp_path / "1.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "2.png")
    told = {Path(finding.where).name: finding.what for finding in findings_of(tmp_path)}
    assert told.keys() == {"1.txt", "2.png"}
    assert "is no caption" in told["1.txt"]


def test_a_caption_of_ten_megabytes_is_none(tmp_path):
    make_images(tmp_path, 1)
    (tmp_path / "0.txt").write_text("a," * 5_000_000)
    (finding,) = findings_of(tmp_path)
    assert "has more than 262144 bytes, and is no caption" in finding.what
    assert finding.remedy == "Shorten it, or remove the file."


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        b"P6 9 9 255\n" + bytes(243),
        b"8BPS\0\1" + bytes(30),
    ],
)
def test_only_formats_of_images_are_decoded(tmp_path, content):
    """Pillow would give the first to a program, whatever the file is called."""
    (tmp_path / "0.png").write_bytes(content)
    (finding,) = findings_of(tmp_path)
    assert "no image that can be read" in finding.what
