"""Folders named <repeats>_<class tokens>: what is read, and what is said when they are not where they should be."""

from pathlib import Path

import pytest

from library.data.folders import parse_folder_name
from library.data.options import CaptionOptions
from tests.library.data.reading import errors, golden, make_images, read, write


@pytest.mark.parametrize("case", golden("folder_names")["cases"], ids=lambda case: case["folder"])
def test_folder_names_are_read_as_golden(case):
    parsed = parse_folder_name(case["folder"])
    assert parsed == ((case["num_repeats"], case["class_tokens"]) if case["used"] else None)


def test_named_folders_make_one_data_set_in_name_order(tmp_path):
    for name in ("10_sks dog", "2_sks cat", "notes"):
        make_images(tmp_path / "train" / name)
    make_images(tmp_path / "reg" / "1_dog")
    captions = CaptionOptions(caption_extention="txt", keep_tokens=1)
    spec, findings = read(train=tmp_path / "train", reg=tmp_path / "reg", captions=captions, train_batch_size=3)
    (dataset,) = spec.datasets
    assert dataset.batch_size == 3
    assert [(s.name, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets] == [
        ("10_sks dog", 10, "sks dog", False),
        ("2_sks cat", 2, "sks cat", False),
        ("1_dog", 1, "dog", True),
    ]
    assert {s.caption_extension for s in dataset.subsets} == {".txt"}
    assert {s.captions.keep_tokens for s in dataset.subsets} == {1}
    (finding,) = findings
    assert finding.severity == "warning"
    assert "10_notes" in finding.remedy


def test_images_one_level_too_high_name_the_fix(tmp_path):
    make_images(tmp_path / "dog", 2)
    (finding,) = errors(read(train=tmp_path / "dog")[1])
    assert "holds 2 images itself" in finding.what
    assert "10_dog" in finding.remedy
    make_images(tmp_path / "10_sks dog", 2)
    (finding,) = errors(read(train=tmp_path / "10_sks dog")[1])
    assert finding.remedy == f'Give the folder above it: --train_data_dir="{tmp_path}"'


def test_images_one_level_too_low_name_the_fix(tmp_path):
    make_images(tmp_path / "project" / "train" / "10_sks dog")
    (finding,) = errors(read(train=tmp_path / "project")[1])
    assert "one level lower: 'train'" in finding.what
    assert f'--train_data_dir="{tmp_path / "project" / "train"}"' in finding.remedy


def test_folders_without_a_number_name_the_fix(tmp_path):
    make_images(tmp_path / "dogs")
    (finding,) = errors(read(train=tmp_path)[1])
    assert "'dogs'" in finding.what
    assert "10_dogs" in finding.remedy


def test_a_missing_base_folder_names_its_neighbour(tmp_path):
    make_images(tmp_path / "training" / "1_dog")
    (finding,) = errors(read(train=tmp_path / "trainig")[1])
    assert "folder not found" in finding.what
    assert str(tmp_path / "training") in finding.remedy


def test_no_data_at_all_names_both_ways():
    (finding,) = errors(read()[1])
    assert "--dataset_config" in finding.remedy
    assert "--train_data_dir" in finding.remedy


def test_folders_beside_a_dataset_file_are_ignored_with_a_warning(tmp_path):
    path = write(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    spec, (finding,) = read(path, train=tmp_path / "x")
    assert finding.severity == "warning"
    assert [subset.name for subset in spec.datasets[0].subsets] == ["a"]


def test_an_empty_folder_for_regularisation_is_told_and_no_mistake(tmp_path):
    make_images(tmp_path / "train" / "2_shs thing")
    (tmp_path / "reg").mkdir()
    spec, findings = read(train=tmp_path / "train", reg=tmp_path / "reg")
    (finding,) = findings
    assert (finding.severity, finding.where) == ("warning", "--reg_data_dir")
    assert len(spec.datasets[0].subsets) == 1
    (tmp_path / "reg" / "note.txt").write_text("x")
    assert errors(read(train=tmp_path / "train", reg=tmp_path / "reg")[1])


def test_a_folder_for_regularisation_that_cannot_be_read_is_a_mistake(tmp_path, monkeypatch):
    make_images(tmp_path / "train" / "2_shs thing")
    (tmp_path / "reg").mkdir()

    def refuse(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    (finding,) = errors(read(train=tmp_path / "train", reg=tmp_path / "reg")[1])
    assert finding.where == "--reg_data_dir"
