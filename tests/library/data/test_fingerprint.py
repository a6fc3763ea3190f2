"""A fingerprint changes with everything that is trained on, and with nothing else."""

import shutil
from dataclasses import replace

import pytest

from library.data import fingerprint as module
from library.data.fingerprint import data_differences, data_fingerprint
from tests.library.data.small_set import make_spec, make_subset, write_images


@pytest.fixture
def data(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    records = [record for n, folder in enumerate(folders) for record in write_images(folder, subset=n, seed=n)]
    return make_spec(*map(make_subset, folders)), records


def test_it_says_nothing_of_the_place(data, tmp_path):
    spec, records = data
    before = data_fingerprint(spec, records)
    assert before["images"] == 10
    assert str(tmp_path) not in repr(before)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    first, second = spec.datasets[0].subsets
    subsets = (replace(first, image_dir=tmp_path / "moved", name="moved"), second)
    moved = replace(spec, datasets=(replace(spec.datasets[0], subsets=subsets),))
    there = [replace(one, folder=tmp_path / "moved") if one.subset == 0 else one for one in records]
    after = data_fingerprint(moved, there)
    assert after["digest"] == before["digest"]
    assert data_differences(before, after) == []


def change_image(records):
    records[7].path.write_bytes(records[6].path.read_bytes())


def change_caption(records):
    records[1] = replace(records[1], caption="other")


def change_tags(records):
    records[1] = replace(records[1], tags="a, b")


def change_repeats(records):
    records[1] = replace(records[1], repeats=3)


def change_bucket(records):
    records[1] = replace(records[1], bucket=(64, 32))


def remove(records):
    del records[4]


def mask(records):
    records[2] = replace(records[2], mask=records[3].path)


CHANGES = [
    (change_image, ["two/2.png: another image"]),
    (change_caption, ["one/1.png: another caption"]),
    (change_tags, ["one/1.png: another caption"]),
    (change_repeats, ["one: other repeats, sizes or uses of the images"]),
    (change_bucket, ["one: other repeats, sizes or uses of the images"]),
    (remove, ["one/4.png: is not there"]),
    (mask, ["one/2.png: another mask"]),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_changed_is_named(data, change, told):
    spec, records = data
    before = data_fingerprint(spec, records)
    change(records)
    after = data_fingerprint(spec, records)
    assert after["digest"] != before["digest"]
    assert data_differences(before, after) == told
    if change is remove:
        assert data_differences(after, before) == ["one/4.png: was not there"]


def test_of_many_images_the_folder_is_named(data, monkeypatch):
    monkeypatch.setattr(module, "MOST_LISTED", 4)
    spec, records = data
    before = data_fingerprint(spec, records)
    assert "files" not in before["subsets"][0]
    change_image(records)
    assert data_differences(before, data_fingerprint(spec, records)) == [
        "two: some images or captions are not the same"
    ]


def test_other_subsets_are_told(data):
    spec, records = data
    fewer = replace(spec, datasets=(replace(spec.datasets[0], subsets=spec.datasets[0].subsets[:1]),))
    before, after = data_fingerprint(spec, records), data_fingerprint(fewer, records[:5])
    assert data_differences(before, after) == ["the data sets have other subsets"]
