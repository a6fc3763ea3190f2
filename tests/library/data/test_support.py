"""What each training method accepts of data sets, against the reference's validator, and what is said otherwise."""

import json
from dataclasses import replace

import pytest

from library.data.options import CaptionOptions
from library.data.records import scan
from library.data.support import DREAMBOOTH, FINE_TUNING, NETWORK, TEXTUAL_INVERSION, DataSupport
from tests.library.data.reading import errors, golden, make_images, read, write

VALIDITY = golden("dataset_config_validity")["table"]
METHODS = {
    "train_network": NETWORK,
    "train_db": DREAMBOOTH,
    "fine_tune": FINE_TUNING,
    "train_textual_inversion": TEXTUAL_INVERSION,
}


def folder_set(tmp_path, subset="", general=""):
    make_images(tmp_path / "images")
    text = f"[general]\n{general}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path}/images'\n{subset}\n"
    return write(tmp_path, text)


def metadata_set(tmp_path, general=""):
    make_images(tmp_path / "images")
    (tmp_path / "meta.json").write_text(json.dumps({"0": {"caption": "a dog"}}))
    text = (
        f"[general]\n{general}\n[[datasets]]\n[[datasets.subsets]]\n"
        f"image_dir = '{tmp_path}/images'\nmetadata_file = '{tmp_path}/meta.json'\n"
    )
    return write(tmp_path, text)


@pytest.mark.parametrize("script", METHODS)
def test_a_method_takes_the_styles_that_the_reference_takes(tmp_path, script):
    for style, make in {"dreambooth": folder_set, "finetuning": metadata_set}.items():
        is_allowed = VALIDITY[script][style] != "style not allowed"
        found = errors(read(make(tmp_path), support=METHODS[script])[1])
        assert (not found) == is_allowed, (style, found)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("key", ["caption_extension = '.txt'", "class_tokens = 'dog'"])
def test_general_keys_about_folders_are_refused_where_no_data_set_has_folders(tmp_path, script, key):
    style = "finetuning" if script != "train_db" else "dreambooth"
    make = metadata_set if style == "finetuning" else folder_set
    is_allowed = "general" in VALIDITY[script][style][key.split()[0]]
    assert (not errors(read(make(tmp_path, general=key), support=METHODS[script])[1])) == is_allowed


def test_a_folder_for_fine_tuning_is_an_error_that_names_the_way_out(tmp_path):
    (finding,) = errors(read(folder_set(tmp_path), support=FINE_TUNING)[1])
    assert "described by a metadata file only" in finding.what
    assert finding.where.endswith("data.toml:4")
    assert "--in_json" in finding.remedy
    assert "train_db.py" in finding.remedy


def test_fine_tuning_without_metadata_asks_for_it_and_not_for_folders(tmp_path):
    make_images(tmp_path / "train" / "10_dog")
    (finding,) = errors(read(train=tmp_path / "train", support=FINE_TUNING)[1])
    assert "no metadata file is given" in finding.what
    assert "--in_json=FILE" in finding.remedy


def test_metadata_for_dreambooth_is_an_error_that_names_the_way_out(tmp_path):
    make_images(tmp_path / "images")
    (tmp_path / "meta.json").write_text(json.dumps({"0": {"caption": "a dog"}}))
    (finding,) = errors(read(in_json=tmp_path / "meta.json", train=tmp_path / "images", support=DREAMBOOTH)[1])
    assert finding.where == "--in_json"
    assert "--train_data_dir" in finding.remedy
    assert "fine_tune.py" in finding.remedy


def test_regularisation_images_are_refused_where_there_is_no_use_for_them(tmp_path):
    path = folder_set(tmp_path, subset="is_reg = true")
    assert not errors(read(path)[1])
    found = errors(read(path, support=DataSupport(regularisation=False))[1])
    assert ["no regularisation images" in finding.what for finding in found] == [True]


def test_masks_are_refused_where_there_is_no_use_for_them(tmp_path):
    path = folder_set(tmp_path, subset="alpha_mask = true")
    assert not errors(read(path)[1])
    found = errors(read(path, masked=True, support=DataSupport(masks=False))[1])
    assert {finding.where.rsplit("/", 1)[-1] for finding in found} == {"data.toml:4", "--masked_loss"}


@pytest.mark.parametrize("name", ["caption_dropout_rate", "caption_tag_dropout_rate", "caption_dropout_every_n_epochs"])
def test_caption_dropout_of_the_command_line_is_refused_too(tmp_path, name):
    captions = CaptionOptions(**{name: 1})
    path = folder_set(tmp_path)
    assert not errors(read(path, captions=captions)[1])
    (finding,) = errors(read(path, captions=captions, support=TEXTUAL_INVERSION)[1])
    assert finding.where == f"--{name}"


@pytest.mark.parametrize(("support", "severity"), [(NETWORK, "error"), (FINE_TUNING, "warning")])
def test_masks_that_are_not_there(tmp_path, support, severity):
    make_images(tmp_path / "images")
    (tmp_path / "one.json").write_text('{"0": {"caption": "a"}}', encoding="utf-8")
    _, findings = read(train=tmp_path / "images", in_json=tmp_path / "one.json", masked=True, support=support)
    assert [one.severity for one in findings if one.what == "--masked_loss is given, but no masks"] == [severity]


def test_captions_that_a_method_does_not_use_are_not_looked_for(tmp_path):
    make_images(tmp_path / "train" / "2_shs thing", 1)
    for image in (tmp_path / "train" / "2_shs thing").glob("*.png"):
        image.with_suffix(".txt").write_text("a thing")
    spec, _ = read(train=tmp_path / "train", support=TEXTUAL_INVERSION)
    (finding,) = errors(scan(spec)[1])
    assert "no .caption files" in finding.what
    spec, _ = read(train=tmp_path / "train", support=replace(TEXTUAL_INVERSION, captions=False))
    assert not scan(spec)[1]
