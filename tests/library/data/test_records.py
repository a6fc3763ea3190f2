"""From folders to records: images, sizes, captions, balanced regularisation, and damaged files."""

import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from library.data.caption_files import UnreadableCaptionError, read_text
from library.data.image_headers import UnreadableImageError, displayed_size
from library.data.records import balance_regularisation, scan
from library.data.spec import BucketRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec
from library.data.summary import tag_counts
from tests.library.data.small_set import make_spec, make_subset

GOLDEN = Path(__file__).parents[2] / "golden"
CAPTION_FILES = json.loads((GOLDEN / "caption_files.json").read_text())["cases"]
REG_BALANCE = json.loads((GOLDEN / "reg_balance.json").read_text())["cases"]


def subset_of(folder, **changes):
    return SubsetSpec(**({"image_dir": folder, "name": folder.name, "where": "data.toml:3"} | changes))


def dataset_of(*subsets):
    return DatasetSpec(
        resolution=(64, 64), batch_size=1, buckets=BucketRules(enable_bucket=True), subsets=subsets, where="data.toml:1"
    )


def spec_of(*subsets):
    return DataSpec(datasets=(dataset_of(*subsets),), where="data.toml")


def make_images(folder, names, size=(8, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(folder / name)


def encoded(image_format, size=(40, 30), **options):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, image_format, **options)
    return buffer.getvalue()


# --- caption files ---

UTF8_BOM = "utf8 bom"
EMPTY_FILE = "empty file"
MIXED_CASE = "mixed case ext not found"


@pytest.mark.parametrize("case", CAPTION_FILES, ids=lambda case: case["label"])
def test_caption_files_are_read_as_golden_but_for_listed_differences(tmp_path, case):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / case["image"]).write_bytes(encoded("PNG"))
    for name, content in case["files"].items():
        is_hex = case["label"] in (UTF8_BOM, "not utf8")
        (folder / name).write_bytes(bytes.fromhex(content) if is_hex else content.encode())
    subset = subset_of(
        folder,
        caption_extension=case["caption_extension"],
        class_tokens=case["class_tokens"],
        captions=CaptionRules(enable_wildcard=case["enable_wildcard"]),
    )
    records, findings = scan(spec_of(subset))
    captions = [record.caption for record in records]
    if case["label"] == EMPTY_FILE:
        # Difference: an empty file is an empty caption with a warning, not a crash.
        assert captions == [""]
        assert any("empty" in finding.what for finding in findings)
    elif case["label"] == UTF8_BOM:
        # Difference: the byte-order mark is no part of the caption.
        assert captions == [case["captions"][0].lstrip("\ufeff")] == ["hello"]
    elif case["label"] == MIXED_CASE:
        # Difference: suffixes of images are read in any case.
        assert captions == ["up"]
    elif case["captions"] == "ERROR UnicodeDecodeError":
        (finding,) = [finding for finding in findings if finding.severity == "error"]
        assert "not UTF-8 at byte 0 (line 1); it looks like UTF-16" in finding.what
        assert finding.where.endswith("x.caption")
    else:
        assert captions == case["captions"]
        assert {"f": dict(tag_counts(captions[0]))} == case["tag_frequency"]


def test_a_face_crop_uses_the_caption_of_its_image(tmp_path):
    make_images(tmp_path, ["x_1_2_3_4.png"])
    (tmp_path / "x.caption").write_text("base")
    records, _ = scan(spec_of(subset_of(tmp_path)))
    assert records[0].caption == "base"


def test_underscores_of_folders_do_not_count(tmp_path):
    folder = tmp_path / "a_b_c_d_e_f"
    make_images(folder, ["x.png"])
    (tmp_path / "a_b.caption").write_text("wrong")
    records, _ = scan(spec_of(subset_of(folder, class_tokens="right")))
    assert [record.caption for record in records] == ["right"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("one\ncafé\n".encode("cp1252"), "byte 7 (line 2); it looks like Windows-1252"),
        ("one\ntwo".encode("utf-16"), "byte 0 (line 1); it looks like UTF-16"),
        ("one\ntwo".encode("utf-16-le"), "byte 1 (line 1); it looks like UTF-16"),
    ],
)
def test_another_encoding_is_named_with_its_place(tmp_path, content, said):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UnreadableCaptionError) as caught:
        read_text(path)
    assert said in str(caught.value)


def test_captions_of_another_extension_are_an_error_with_the_right_option(tmp_path):
    make_images(tmp_path, ["a.png", "b.png", "c.png"])
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("words")
    _, (finding,) = scan(spec_of(subset_of(tmp_path, class_tokens="sks dog")))
    assert finding.severity == "error"
    assert ".txt files beside 2 of 3 images" in finding.what
    assert "--caption_extension=.txt" in finding.remedy
    # Regularisation images are commonly meant to be trained by their class alone.
    reg = subset_of(tmp_path, class_tokens="dog", is_reg=True)
    assert [finding.severity for finding in scan(spec_of(reg))[1] if ".txt" in finding.what] == ["warning"]
    assert not scan(spec_of(subset_of(tmp_path, class_tokens="sks dog", caption_extension=".none")))[1]


def test_captions_called_like_the_whole_image_name_are_noticed(tmp_path):
    make_images(tmp_path, ["a.png"])
    (tmp_path / "a.png.txt").write_text("words")
    _, (finding,) = scan(spec_of(subset_of(tmp_path)))
    assert finding.severity == "error"
    assert ".png.txt" in finding.what


def test_missing_captions_and_unused_lines_are_warnings(tmp_path):
    make_images(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "a.txt").write_text("one\ntwo")
    subset = subset_of(tmp_path, caption_extension=".txt")
    records, findings = scan(spec_of(subset))
    assert [record.has_caption_file for record in records] == [True, False, False]
    assert {finding.severity for finding in findings} == {"warning"}
    assert any("2 of 3 images" in finding.what and "b.png, c.png" in finding.what for finding in findings)
    assert any("only the first is used: a.png" in finding.what for finding in findings)
    (record, *_), findings = scan(spec_of(replace(subset, captions=CaptionRules(enable_wildcard=True))))
    assert record.caption == "one\ntwo"
    assert not any("only the first" in finding.what for finding in findings)


def test_nothing_to_say_to_the_model_is_a_warning(tmp_path):
    make_images(tmp_path, ["a.png"])
    _, (finding,) = scan(spec_of(subset_of(tmp_path)))
    assert finding.severity == "warning"
    assert "class_tokens" in finding.remedy
    assert not scan(spec_of(subset_of(tmp_path, class_tokens="sks dog")))[1]


# --- images ---


def test_records_are_sorted_and_complete(tmp_path):
    names = ["b.png", "a.JPG", "c.Webp", "d.BMP", "e.jpeg"]
    make_images(tmp_path / "one", names)
    make_images(tmp_path / "two", ["a.png"])
    (tmp_path / "one" / ".hidden.png").write_bytes(b"")
    (tmp_path / "one" / "notes.md").write_text("x")
    (tmp_path / "one" / "sub").mkdir()
    make_images(tmp_path / "one" / "sub", ["z.png"])
    two, one = (
        subset_of(tmp_path / "two", class_tokens="t"),
        subset_of(tmp_path / "one", class_tokens="o", num_repeats=3),
    )
    spec = DataSpec(datasets=(dataset_of(two, one), dataset_of(one)), where="data.toml")
    records, findings = scan(spec)
    assert not findings
    expected = [(0, 0, "a.png")] + [(0, 1, name) for name in sorted(names)] + [(1, 0, name) for name in sorted(names)]
    assert [(record.dataset, record.subset, record.path.name) for record in records] == expected
    assert [record.repeats for record in records] == [1] + [3] * 10
    assert {record.size for record in records} == {(8, 6)}


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    make_images(tmp_path, [f"{letter}.png" for letter in "cabfed"])
    spec = spec_of(subset_of(tmp_path, class_tokens="x"))
    scandir = os.scandir
    found = []
    for is_reversed in (False, True):

        @contextmanager
        def listed(folder, is_reversed=is_reversed):
            with scandir(folder) as entries:
                yield iter(sorted(entries, key=lambda entry: entry.name, reverse=is_reversed))

        monkeypatch.setattr(os, "scandir", listed)
        found.append(scan(spec)[0])
    assert len(found[0]) == 6
    assert found[0] == found[1]


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


FORMATS = ["JPEG", "PNG", "WEBP", "TIFF"] + (["AVIF"] if features.check("avif") else [])


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_the_displayed_one(tmp_path, image_format, orientation):
    path = tmp_path / "a.img"
    path.write_bytes(encoded(image_format, exif=exif(orientation)))
    assert displayed_size(path) == ((40, 30) if orientation <= 4 else (30, 40))


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    content = encoded("PNG", exif=exif(6))
    start = content.index(b"eXIf") - 4
    length = 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, rest = content[start : start + length], content[:start] + content[start + length :]
    path = tmp_path / "a.png"
    path.write_bytes(rest[:-12] + chunk + rest[-12:])
    assert displayed_size(path) == (30, 40)


@pytest.mark.parametrize("image_format", [*FORMATS, "BMP"])
def test_a_truncated_image_is_found(tmp_path, image_format):
    content = encoded(image_format, (200, 200))
    path = tmp_path / "a.img"
    path.write_bytes(content)
    assert displayed_size(path) == (200, 200)
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UnreadableImageError):
            displayed_size(path)


@pytest.mark.parametrize(
    ("image_format", "change"),
    [
        ("JPEG", lambda content: content + b"\0" * 100),
        ("JPEG", lambda content: content + b"MotionPhoto" * 1000),
        ("PNG", lambda content: content + b"junk"),
        ("BMP", lambda content: content[:2] + b"\0\0\0\0" + content[6:]),
        ("WEBP", lambda content: content + b"\0"),
    ],
)
def test_harmless_oddities_pass(tmp_path, image_format, change):
    path = tmp_path / "a.img"
    path.write_bytes(change(encoded(image_format)))
    assert displayed_size(path) == (40, 30)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"\x00\x01\x02\x03" * 100, "no image that can be read")],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, content, said):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError) as caught:
        displayed_size(path)
    assert said in str(caught.value)


def test_every_damaged_file_is_named_and_many_are_counted(tmp_path):
    make_images(tmp_path, ["good.png"])
    for number in range(8):
        (tmp_path / f"bad{number}.jpg").write_bytes(encoded("JPEG")[:100])
    records, findings = scan(spec_of(subset_of(tmp_path, class_tokens="x")))
    assert [record.path.name for record in records] == ["good.png"]
    assert [Path(finding.where).name for finding in findings[:5]] == [f"bad{number}.jpg" for number in range(5)]
    assert findings[5].what == "3 more images that cannot be read: bad5.jpg, bad6.jpg, bad7.jpg"
    assert {finding.severity for finding in findings} == {"error"}


def test_a_folder_in_two_data_sets_is_reported_once(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    subset = subset_of(tmp_path, class_tokens="x")
    _, findings = scan(DataSpec(datasets=(dataset_of(subset), dataset_of(subset)), where="data.toml"))
    assert len(findings) == 1


def test_formats_that_are_not_read_are_mentioned(tmp_path):
    make_images(tmp_path, ["a.png", "b.gif", "c.TIF"])
    (tmp_path / "d.SVG").write_text("<svg/>")
    records, findings = scan(spec_of(subset_of(tmp_path, class_tokens="x")))
    assert [record.path.name for record in records] == ["a.png", "c.TIF"]
    assert [finding.what.split(" in ")[0] for finding in findings] == ["1 .gif files", "1 .svg files"]


PLUGIN = """
from PIL import Image, PngImagePlugin
Image.register_open("JXL", PngImagePlugin.PngImageFile, lambda start: start.startswith(b"\\x89PNG"))
"""


def test_a_format_with_an_installed_plugin_is_read(tmp_path):
    """In a process of its own, with a plugin that takes PNG for JPEG XL: this one must not learn it."""
    (tmp_path / "pillow_jxl.py").write_text(PLUGIN)
    (tmp_path / "a.jxl").write_bytes(encoded("PNG"))
    code = (
        "import sys; from pathlib import Path; from library.data.folders import image_names\n"
        "from library.data.image_headers import displayed_size; from library.data.images import decode\n"
        f"folder = Path({str(tmp_path)!r}); print(image_names(folder), displayed_size(folder / 'a.jxl'))\n"
        "print(decode(folder / 'a.jxl').size, 'pillow_jxl' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["['a.jxl'] (40, 30)", "(40, 30) True"]


def test_a_missing_folder_has_no_records(tmp_path):
    assert scan(spec_of(subset_of(tmp_path / "none"))) == ((), ())


# --- regularisation ---


@pytest.mark.parametrize("case", REG_BALANCE, ids=lambda case: f"{case['train']}-{case['reg']}")
def test_regularisation_is_balanced_as_golden(tmp_path, case):
    image = encoded("PNG")
    subsets = []
    for kind, folders in (("t", case["train"]), ("r", case["reg"])):
        for number, folder in enumerate(folders):
            path = tmp_path / f"{kind}{number}"
            path.mkdir()
            for index in range(folder["images"]):
                (path / f"i{index}.png").write_bytes(image)
            subsets.append(subset_of(path, class_tokens="x", is_reg=kind == "r", num_repeats=folder["repeats"]))
    records, findings = scan(spec_of(*subsets))
    found = {f"{record.path.parent.name}/{record.path.name}": record.repeats for record in records}
    assert found == case["final_repeats_per_image"]
    assert sum(found.values()) == case["entries_per_epoch"]
    images = sum(folder["images"] for folder in [*case["train"], *case["reg"]])
    assert bool(findings) == (len(found) < images)


@given(train=st.integers(0, 300), repeats=st.lists(st.integers(1, 20), max_size=30))
def test_balancing_reaches_the_training_images_and_hardly_more(train, repeats):
    result = balance_regularisation(train, repeats)
    assert len(result) == len(repeats)
    if repeats and train:
        assert train <= sum(result) < train + max(repeats)
        assert result[0] >= repeats[0]
    else:
        assert sum(result) == 0


def test_an_epoch_has_an_end(tmp_path):
    make_images(tmp_path / "a", [f"{number}.png" for number in range(60)])
    records, findings = scan(make_spec(make_subset(tmp_path / "a", num_repeats=1_000_000)))
    assert records == ()
    assert any("an epoch would have 60,000,000 images" in finding.what for finding in findings)
