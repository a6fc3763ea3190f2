"""What is found wrong with a training set as a whole, and that a good one passes without a word."""

from dataclasses import replace

import pytest
from PIL import Image

from library.data.lint import lint
from library.data.records import scan
from library.data.spec import AugmentRules, BucketRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec

BUCKETS = BucketRules(enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)


def subset_of(folder, **changes):
    known = {"image_dir": folder, "name": folder.name, "where": "data.toml:3", "class_tokens": "sks dog"}
    return SubsetSpec(**(known | changes))


def spec_of(*subsets, buckets=BUCKETS, resolution=(64, 64)):
    dataset = DatasetSpec(resolution=resolution, batch_size=1, buckets=buckets, subsets=subsets, where="data.toml:1")
    return DataSpec(datasets=(dataset,), where="data.toml")


def make_images(folder, count=1, size=(64, 64)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size).save(folder / f"{size[0]}x{size[1]}-{number}.png")
    return folder


def findings_of(spec):
    return lint(spec, scan(spec)[0])


def test_a_good_set_passes_without_a_word(tmp_path):
    train = make_images(tmp_path / "train", 5)
    make_images(train, 1, (96, 40))
    reg = make_images(tmp_path / "reg", 6)
    assert findings_of(spec_of(subset_of(train), subset_of(reg, is_reg=True))) == []


# --- paths ---


def only_error(spec):
    (finding,) = findings_of(spec)
    assert finding.severity == "error"
    assert finding.where == "data.toml:3"
    return finding


def test_a_misspelt_folder_names_the_right_one(tmp_path):
    make_images(tmp_path / "photos" / "Anna")
    finding = only_error(spec_of(subset_of(tmp_path / "photos" / "ana")))
    assert finding.what == f"folder not found: '{tmp_path / 'photos' / 'ana'}'"
    assert finding.remedy == f"Did you mean image_dir = '{tmp_path / 'photos' / 'Anna'}'?"


def test_a_misspelt_folder_in_the_middle_names_the_whole_path(tmp_path):
    make_images(tmp_path / "photos" / "anna")
    finding = only_error(spec_of(subset_of(tmp_path / "phtos" / "anna")))
    assert finding.remedy == f"Did you mean image_dir = '{tmp_path / 'photos' / 'anna'}'?"


def test_a_folder_with_no_near_name_shows_what_is_there(tmp_path):
    make_images(tmp_path / "one")
    finding = only_error(spec_of(subset_of(tmp_path / "qqqqqqq")))
    assert "'one'" in finding.remedy


def test_a_backslash_path_is_shown_with_slashes(tmp_path, monkeypatch):
    make_images(tmp_path / "photos" / "anna")
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    folder = Path("photos\\anna")
    if folder.is_dir():
        pytest.skip("the backslash is a separator here")
    assert "image_dir = 'photos/anna'" in only_error(spec_of(subset_of(folder))).remedy


def test_an_image_instead_of_its_folder(tmp_path):
    make_images(tmp_path / "anna")
    finding = only_error(spec_of(subset_of(tmp_path / "anna" / "64x64-0.png")))
    assert "is a file" in finding.what
    assert f"image_dir = '{tmp_path / 'anna'}'" in finding.remedy


def test_images_one_level_lower(tmp_path):
    make_images(tmp_path / "set" / "10_sks dog", 3)
    finding = only_error(spec_of(subset_of(tmp_path / "set")))
    assert "in the folders inside it: '10_sks dog (3)'" in finding.what
    assert f"image_dir = '{tmp_path / 'set' / '10_sks dog'}'" in finding.remedy


def test_images_in_several_folders_lower(tmp_path):
    for name in "abcde":
        make_images(tmp_path / "set" / name)
    finding = only_error(spec_of(subset_of(tmp_path / "set")))
    assert "and 2 more" in finding.what
    assert "an entry of its own" in finding.remedy


def test_images_one_level_higher(tmp_path):
    make_images(tmp_path / "anna", 2)
    finding = only_error(spec_of(subset_of(tmp_path / "anna" / "images")))
    assert "folder not found" in finding.what
    assert finding.remedy == f"The folder above it exists and fits: image_dir = '{tmp_path / 'anna'}'"


def test_a_named_folder_with_images_one_level_lower(tmp_path):
    make_images(tmp_path / "10_dog" / "raw")
    subset = subset_of(tmp_path / "10_dog", where="--train_data_dir")
    (finding,) = findings_of(spec_of(subset))
    assert "'raw (1)'" in finding.what
    assert finding.remedy.startswith("Put the images directly into")


def test_an_empty_folder_and_one_with_other_files(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no files" in only_error(spec_of(subset_of(tmp_path / "empty"))).what
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.heic", "b.heic", "c.txt"):
        (other / name).write_bytes(b"x")
    finding = only_error(spec_of(subset_of(other)))
    assert "2 .heic, 1 .txt" in finding.what
    assert "convert them" in finding.remedy


# --- sizes ---


NO_BUCKETS = BucketRules(enable_bucket=False)


def test_without_buckets_other_sizes_are_warned_of(tmp_path):
    make_images(tmp_path / "a", 1, (64, 64))
    make_images(tmp_path / "a", 7, (80, 64))
    (finding,) = findings_of(spec_of(subset_of(tmp_path / "a"), buckets=NO_BUCKETS))
    assert finding.severity == "warning"
    assert "7 of 8 images in 'a' are not 64x64, and are resized or cropped to it: 80x64-0.png 80x64" in finding.what
    assert "and 2 more" in finding.what
    assert "--enable_bucket" in finding.remedy


def test_without_buckets_a_random_crop_takes_larger_images(tmp_path):
    make_images(tmp_path / "a", 1, (80, 64))
    subset = subset_of(tmp_path / "a", augment=AugmentRules(random_crop=True))
    assert not findings_of(spec_of(subset, buckets=NO_BUCKETS))
    make_images(tmp_path / "a", 1, (80, 60))
    (finding,) = findings_of(spec_of(subset, buckets=NO_BUCKETS))
    assert "1 of 2 images" in finding.what


def test_tiny_and_extreme_images_are_warned_of(tmp_path):
    folder = make_images(tmp_path / "a", 3, (30, 30))
    make_images(folder, 2, (640, 64))
    make_images(folder, 1, (64, 64))
    tiny, extreme = findings_of(spec_of(subset_of(folder)))
    assert tiny.severity == extreme.severity == "warning"
    assert "3 of 6 images" in tiny.what
    assert "2 of 6 images" in extreme.what


def test_an_image_too_small_for_any_bucket_is_an_error(tmp_path):
    folder = make_images(tmp_path / "a", 1, (12, 64))
    buckets = replace(BUCKETS, bucket_no_upscale=True)
    (finding,) = findings_of(spec_of(subset_of(folder), buckets=buckets))
    assert finding.severity == "error"
    assert finding.where.endswith("12x64-0.png")


# --- captions ---


def caption_set(tmp_path, texts):
    folder = make_images(tmp_path / "a", len(texts))
    for number, text in enumerate(texts):
        (folder / f"64x64-{number}.txt").write_text(text)
    return subset_of(folder, caption_extension=".txt", class_tokens=None)


def test_captions_that_are_all_the_same_are_warned_of(tmp_path):
    subset = caption_set(tmp_path, ["a dog"] * 5)
    (finding,) = findings_of(spec_of(subset))
    assert finding.severity == "warning"
    assert "all 5 captions in 'a' are the same: 'a dog'" in finding.what
    assert not findings_of(spec_of(caption_set(tmp_path, ["a dog"] * 4 + ["a cat"])))


def test_wildcards_that_are_off_are_warned_of(tmp_path):
    subset = caption_set(tmp_path, ["a {red|blue} dog"])
    (finding,) = findings_of(spec_of(subset))
    assert "enable_wildcard = true" in finding.remedy
    assert not findings_of(spec_of(replace(subset, captions=CaptionRules(enable_wildcard=True))))


def test_a_mark_that_would_stay_in_captions_is_warned_of(tmp_path):
    subset = caption_set(tmp_path, ["a ||| b"])
    marked = CaptionRules(keep_tokens_separator="|||")
    (finding,) = findings_of(spec_of(replace(subset, captions=marked)))
    assert "stays in the captions" in finding.what
    assert not findings_of(spec_of(replace(subset, captions=replace(marked, shuffle_caption=True))))


# --- repeats and regularisation ---


def test_very_many_repeats_are_warned_of(tmp_path):
    (finding,) = findings_of(spec_of(subset_of(make_images(tmp_path / "a"), num_repeats=2000)))
    assert "2000" in finding.what


def test_regularisation_alone_is_an_error(tmp_path):
    (finding,) = findings_of(spec_of(subset_of(make_images(tmp_path / "a"), is_reg=True)))
    assert finding.severity == "error"
    assert "only regularisation images" in finding.what


def test_few_regularisation_images_are_warned_of(tmp_path):
    train = subset_of(make_images(tmp_path / "a", 2), num_repeats=30)
    (finding,) = findings_of(spec_of(train, subset_of(make_images(tmp_path / "r", 2), is_reg=True)))
    assert "2 regularisation images are repeated up to 30 times to balance 60" in finding.what


def test_regularisation_that_outweighs_is_warned_of(tmp_path):
    train = subset_of(make_images(tmp_path / "a", 2))
    reg = subset_of(make_images(tmp_path / "r", 2), is_reg=True, num_repeats=9)
    (finding,) = findings_of(spec_of(train, reg))
    assert "9 regularisation images and only 2" in finding.what


def test_all_errors_are_found_together(tmp_path):
    spec = spec_of(*(subset_of(tmp_path / name) for name in "xyz"))
    assert [finding.severity for finding in findings_of(spec)] == ["error"] * 3
