"""Metadata of the data sets, and the table shown before training."""

import json
import re

import pytest
from PIL import Image

from library.data.records import scan
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec
from library.data.summary import dataset_metadata, startup_table, tag_counts

BUCKETS = BucketRules(enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)


def subset_of(folder, **changes):
    known = {"image_dir": folder, "name": folder.name, "where": "data.toml:3", "caption_extension": ".txt"}
    return SubsetSpec(**(known | changes))


def dataset_of(*subsets, buckets=BUCKETS, batch_size=2):
    return DatasetSpec(
        resolution=(64, 64), batch_size=batch_size, buckets=buckets, subsets=subsets, where="data.toml:1"
    )


@pytest.fixture
def folders(tmp_path):
    """Three square and one wide training image with captions, and two regularisation images."""
    train, reg = tmp_path / "private" / "10_sks dog", tmp_path / "private" / "1_dog"
    for folder in (train, reg):
        folder.mkdir(parents=True)
    for number, size in enumerate([(64, 64), (64, 64), (128, 128), (90, 45)]):
        Image.new("RGB", size).save(train / f"{number}.png")
        if number < 3:
            (train / f"{number}.txt").write_text(f"sks dog, Red , red, tag{number}")
    for number in range(2):
        Image.new("RGB", (64, 64)).save(reg / f"{number}.png")
    return train, reg


def make(folders, where, buckets=BUCKETS):
    train, reg = folders
    rules = CaptionRules(shuffle_caption=True, keep_tokens=1)
    spec = DataSpec(
        datasets=(
            dataset_of(
                subset_of(
                    train, num_repeats=2, class_tokens="sks dog", captions=rules, augment=AugmentRules(flip_aug=True)
                ),
                subset_of(reg, is_reg=True, class_tokens="dog"),
                buckets=buckets,
            ),
        ),
        where=where,
    )
    return spec, prepare_data(spec, scan(spec)[0])


TAGS = {
    "10_sks dog": {"sks dog": 4, "red": 6, "tag0": 1, "tag1": 1, "tag2": 1},
    "1_dog": {"dog": 2},
}


def test_folders_give_single_values(folders):
    metadata = dataset_metadata(*make(folders, "--train_data_dir"), batches_per_step=6)
    assert json.loads(metadata.pop("ss_dataset_dirs")) == {"10_sks dog": {"n_repeats": 2, "img_count": 4}}
    assert json.loads(metadata.pop("ss_reg_dataset_dirs")) == {"1_dog": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(metadata.pop("ss_tag_frequency")) == TAGS
    info = json.loads(metadata.pop("ss_bucket_info"))
    # 90x45 has the ratio 2; 80x48 (1.667) is nearer than 96x32 (3): an error of 1/3 for one of six images.
    assert info["buckets"] == {
        "0": {"resolution": [64, 64], "count": 14},
        "1": {"resolution": [80, 48], "count": 2},
    }
    assert info["mean_img_ar_error"] == pytest.approx(1 / 3 / 6)
    assert metadata == {
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "12",
        "ss_resolution": "(64, 64)",
        "ss_color_aug": "False",
        "ss_flip_aug": "True",
        "ss_random_crop": "False",
        "ss_shuffle_caption": "True",
        "ss_keep_tokens": "1",
        "ss_enable_bucket": "True",
        "ss_bucket_no_upscale": "False",
        "ss_min_bucket_reso": "32",
        "ss_max_bucket_reso": "128",
    }


def test_without_buckets_there_is_no_bucket_information(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    dataset = dataset_of(subset_of(tmp_path, class_tokens="x"), buckets=BucketRules())
    spec = DataSpec(datasets=(dataset,), where="--train_data_dir")
    metadata = dataset_metadata(spec, prepare_data(spec, scan(spec)[0]))
    assert metadata["ss_bucket_info"] == "null"
    assert metadata["ss_min_bucket_reso"] == metadata["ss_max_bucket_reso"] == "None"


def test_a_dataset_file_gives_a_list(folders):
    metadata = dataset_metadata(*make(folders, "data.toml"))
    assert sorted(metadata) == ["ss_dataset_dirs", "ss_datasets", "ss_tag_frequency"]
    (dataset,) = json.loads(metadata["ss_datasets"])
    train, reg = dataset.pop("subsets")
    assert dataset.pop("bucket_info")["buckets"]["0"] == {"resolution": [64, 64], "count": 14}
    assert dataset == {
        "is_dreambooth": True,
        "batch_size_per_device": 2,
        "num_train_images": 8,
        "num_reg_images": 8,
        "resolution": [64, 64],
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "tag_frequency": TAGS,
        "resize_interpolation": None,
    }
    assert train["image_dir"] == "10_sks dog"
    assert train["img_count"] == 4
    assert train["num_repeats"] == 2
    assert train["keep_tokens"] == 1
    assert train["flip_aug"]
    assert not train["is_reg"]
    assert reg["is_reg"]
    assert reg["class_tokens"] == "dog"
    # Regularisation folders are not among the merged folders.
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_sks dog": {"n_repeats": 2, "img_count": 4}}
    assert json.loads(metadata["ss_tag_frequency"]) == TAGS


def test_the_same_folder_name_gets_a_number(tmp_path):
    subsets = []
    for parent in "ab":
        folder = tmp_path / parent / "dog"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "x.png")
        subsets.append(subset_of(folder, class_tokens=parent))
    spec = DataSpec(datasets=(dataset_of(subsets[0]), dataset_of(subsets[1])), where="data.toml")
    metadata = dataset_metadata(spec, prepare_data(spec, scan(spec)[0]))
    assert sorted(json.loads(metadata["ss_dataset_dirs"])) == ["dog", "dog (2)"]
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"a": 1}}


@pytest.mark.parametrize("where", ["--train_data_dir", "data.toml"])
def test_no_path_leaves_the_machine(folders, where):
    spec, data = make(folders, where)
    told = json.dumps(dataset_metadata(spec, data)) + startup_table(spec, data, str)
    assert "private" not in told
    assert str(folders[0].parent.parent) not in told


def test_the_table_says_what_is_trained(folders):
    spec, data = make(folders, "data.toml")
    lines = startup_table(spec, data, lambda example: f"caption of {example}").splitlines()
    assert lines[0] == "data set 0: resolution (64, 64), batch size 2"
    assert lines[1] == "  10_sks dog: 4 images x 2 repeats; 3 captions found (.txt), 1 missing: 'sks dog'"
    assert lines[2] == "  1_dog: 2 images x 1 repeats, regularisation; 0 captions found (.txt), 2 missing: 'dog'"
    assert lines[3] == "  regularisation: 8 for 8 training images an epoch; each is used 4 times"
    assert lines[4] == "  bucket 0: resolution (64, 64), count: 14; nothing cropped"
    # 90x45 covers 80x48 when it is 96x48: a sixth is cut off.
    assert lines[5] == "  bucket 1: resolution (80, 48), count: 2; crop loss 16.7%, at most 16.7% (3.png)"
    assert re.fullmatch(r"  mean ar error \(without repeats\): 0\.0555\d", lines[6])
    assert lines[7:] == [
        "captions as trained on in epoch 1, for example:",
        "  0.png: caption of 0",
        "  1.png: caption of 2",
        "  3.png: caption of 6",
    ]


def test_tags_are_counted_in_lower_case():
    assert tag_counts("A, b,,a , ") == {"a": 2, "b": 1}
