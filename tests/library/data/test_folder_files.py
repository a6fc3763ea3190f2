"""What is remembered of folders between runs, and when it is not believed."""

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from library.data import folder_files, index
from library.data.caption_files import UnreadableCaptionError, caption_name, caption_names, index_names
from library.data.folder_files import FolderFiles, Listing
from library.data.image_headers import UnreadableImageError
from library.data.index import Table, cache_folder, is_settled, read_table, write_table

LONG_AGO = 1_600_000_000_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_files, "_WORTH_KEEPING", 2)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8 + number, 6)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number} é\n", encoding="utf-8")
    age(folder)
    return folder


def age(folder, at=LONG_AGO):
    for path in folder.iterdir():
        os.utime(path, ns=(at, at))


IMAGES = ["0.png", "1.png", "2.png"]
TEXTS = ["0.txt", "1.txt", "2.txt"]


class Reads:
    """The files that are really read."""

    def __init__(self, monkeypatch):
        self.names = []
        for name in ("size_of_many", "read_text"):
            read = getattr(folder_files, name)

            def noted(path, read=read):
                self.names.append(Path(path).name)
                return read(path)

            monkeypatch.setattr(folder_files, name, noted)

    def of_a_start(self, folder):
        """What a start finds, and which files it reads."""
        self.names.clear()
        files = FolderFiles(folder)
        found = dict(files.sizes(IMAGES)) | dict(files.texts(TEXTS))
        files.remember()
        return found, sorted(self.names)


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


def test_a_second_start_reads_nothing_and_finds_the_same(folder, reads):
    first, read = reads.of_a_start(folder)
    assert read == sorted(IMAGES + TEXTS)
    assert first == {f"{n}.png": (8 + n, 6) for n in range(3)} | {f"{n}.txt": f"caption {n} é\n" for n in range(3)}
    assert reads.of_a_start(folder) == (first, [])


def test_only_what_has_changed_is_read_again(folder, reads):
    reads.of_a_start(folder)
    (folder / "0.txt").write_text("other 0 é\n", encoding="utf-8")
    Image.new("RGB", (30, 20)).save(folder / "2.png")
    age(folder)  # the sizes in bytes differ
    os.utime(folder / "1.png", ns=(LONG_AGO, LONG_AGO + 1))
    found, read = reads.of_a_start(folder)
    assert read == ["0.txt", "1.png", "2.png"]
    assert (found["0.txt"], found["2.png"]) == ("other 0 é\n", (30, 20))
    assert reads.of_a_start(folder) == (found, [])


def test_a_file_that_was_changed_a_moment_ago_is_not_remembered(folder, reads):
    now = time.time_ns()
    os.utime(folder / "1.txt", ns=(now, now))
    reads.of_a_start(folder)
    assert reads.of_a_start(folder)[1] == ["1.txt"]
    assert is_settled((1, now - 3_000_000_000), now)
    assert not is_settled((1, now - 1_000_000_000), now)


def test_a_listing_that_tells_the_stamps_itself_tells_the_same(folder, monkeypatch):
    names = ["0.png", "1.txt", "gone.png"]
    asked = Listing(folder)
    monkeypatch.setattr(folder_files, "_ASKED_ONE_BY_ONE", False)
    told = Listing(folder)
    assert told.names == asked.names
    (folder / "1.txt").unlink()
    assert told.stamps(names)[0] == (os.stat(folder / "0.png").st_size, LONG_AGO)
    assert told.stamps(names)[1:] == [None, None]
    monkeypatch.undo()
    assert asked.stamps(names) == [told.stamps(["0.png"])[0], None, None]


def test_names_by_suffix_leave_hidden_files_out(folder):
    for name in ("b.PNG", ".png", ".hidden.gif", "Makefile"):
        (folder / name).write_bytes(b"")
    by_suffix = FolderFiles(folder).by_suffix()
    assert sorted(by_suffix[".png"]) == [*IMAGES, "b.PNG"]
    assert ".gif" not in by_suffix
    assert not FolderFiles(folder / "missing").names


def test_what_cannot_be_read_is_said_every_time(folder, reads):
    (folder / "1.png").write_bytes(b"")
    (folder / "1.txt").write_bytes(b"\xff\xfe")
    age(folder)
    for _ in range(2):
        found, read = reads.of_a_start(folder)
        assert isinstance(found["1.png"], UnreadableImageError)
        assert isinstance(found["1.txt"], UnreadableCaptionError)
        assert {"1.png", "1.txt"} <= set(read)
    assert read == ["1.png", "1.txt"]


@pytest.mark.parametrize("damage", [lambda content: content[:-200], lambda content: b"", lambda content: b"x" * 999])
def test_a_damaged_table_is_made_anew_and_said_once(folder, reads, cache, caplog, damage):
    first, _ = reads.of_a_start(folder)
    (path,) = cache.rglob("*-texts.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert reads.of_a_start(folder) == (first, TEXTS)
    assert len([record for record in caplog.records if "damaged" in record.message]) == 1
    assert reads.of_a_start(folder) == (first, [])


def test_a_flipped_bit_is_noticed(folder, reads, cache):
    first, _ = reads.of_a_start(folder)
    (path,) = cache.rglob("*-texts.npz")
    content = path.read_bytes()
    place = content.index(b"caption 1")
    path.write_bytes(content[:place] + b"C" + content[place + 1 :])
    assert reads.of_a_start(folder) == (first, TEXTS)


def test_a_table_of_another_version_is_not_used(folder, reads, monkeypatch):
    reads.of_a_start(folder)
    monkeypatch.setattr(index, "_VERSION", 2)
    assert reads.of_a_start(folder)[1] == sorted(IMAGES + TEXTS)


def test_the_folder_of_the_images_is_left_alone_and_no_place_is_written_down(folder, reads, cache, tmp_path):
    before = sorted(folder.iterdir())
    reads.of_a_start(folder)
    assert sorted(folder.iterdir()) == before
    written = [path for path in cache.rglob("*") if path.is_file()]
    assert len(written) == 2
    for path in written:
        content = path.read_bytes() + path.name.encode()
        assert tmp_path.name.encode() not in content
        assert b"images" not in content


def test_a_small_folder_is_not_remembered(folder, reads, cache, monkeypatch):
    monkeypatch.setattr(folder_files, "_WORTH_KEEPING", 7)
    reads.of_a_start(folder)
    assert not cache.exists()


def test_only_the_first_process_writes_and_all_read(folder, reads, monkeypatch, cache):
    monkeypatch.setenv("RANK", "1")
    reads.of_a_start(folder)
    assert not cache.exists()
    monkeypatch.setenv("RANK", "0")
    reads.of_a_start(folder)
    monkeypatch.setenv("RANK", "1")
    assert reads.of_a_start(folder)[1] == []


def test_a_cache_that_cannot_be_written_to_stops_nothing(folder, reads, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert reads.of_a_start(folder)[0]["0.png"] == (8, 6)


def test_files_that_are_gone_are_forgotten(folder, reads):
    reads.of_a_start(folder)
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text("new")
    age(folder)
    files = FolderFiles(folder)
    files.texts(["1.txt", "2.txt"])
    files.remember()
    assert sorted(read_table(folder, "texts").names) == ["1.txt", "2.txt"]


def test_unused_tables_are_deleted(tmp_path, folder):
    table = Table(["a"], [(1, 2)])
    write_table(folder, "sizes", table)
    (old,) = cache_folder().iterdir()
    os.utime(old, (0, 0))
    write_table(tmp_path, "sizes", table)
    assert [path.name == old.name for path in cache_folder().iterdir()] == [False]


def test_names_that_are_no_text_are_kept(folder):
    names = ["a\udcff.png", "b\nc.png", "é.png"]
    write_table(folder, "sizes", Table(names, [(1, 2)] * 3))
    assert read_table(folder, "sizes").names == names
    write_table(folder, "empty", Table([], []))
    assert read_table(folder, "empty") == Table([], [])


@pytest.mark.parametrize(
    ("image", "extension", "names", "found"),
    [
        ("a.png", ".txt", ["a.TXT", "a.Txt"], "a.TXT"),
        ("a.png", ".txt", ["a.TXT", "a.txt"], "a.txt"),
        ("a.png", ".TXT", ["a.TXT", "a.txt"], "a.txt"),
        ("A.png", ".txt", ["a.txt"], None),
        ("A.b.PNG", ".txt", ["A.b.txt"], "A.b.txt"),
        ("a_1_2_3_4.png", ".txt", ["a.txt", "a_1_2_3_4.txt"], "a_1_2_3_4.txt"),
        ("a_1_2_3_4.png", ".txt", ["a.txt"], "a.txt"),
    ],
)
def test_which_caption_file_belongs_to_an_image(image, extension, names, found):
    assert caption_name(image, extension, index_names([*names, image])) == found
    assert caption_names([image], extension, {*names, image}) == {image: found}
