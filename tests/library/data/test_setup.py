"""Placing images and numbering examples."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from library.data.buckets import Placement
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules, DataSpec
from library.errors import UserError
from tests.library.data.small_set import SIZES, make_data, make_spec, make_subset, write_images


def test_examples_are_records_times_repeats_in_order(tmp_path):
    data = make_data(tmp_path, repeats=2)
    assert data.examples == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    assert data.names([0, 1, 9]) == ["0.png", "0.png", "4.png"]
    assert (data.train_examples, data.reg_examples) == (10, 0)


def test_buckets_hold_every_example_once(tmp_path):
    data = make_data(tmp_path, repeats=3)
    table = {bucket.resolution: (bucket.images, len(bucket.plan.examples)) for bucket in data.buckets}
    assert table == {(40, 88): (1, 3), (64, 64): (3, 9), (88, 40): (1, 3)}
    assert sorted(x for bucket in data.buckets for x in bucket.plan.examples) == list(range(15))
    for bucket in data.buckets:
        for example in bucket.plan.examples:
            assert data.placements[data.examples[example]].bucket == bucket.resolution
    plan = data.plan(0, accumulation=1, world=1)
    assert plan.batches_per_epoch == 2 + 5 + 2


def test_data_sets_never_share_a_bucket(tmp_path):
    subsets = [make_subset(tmp_path / name) for name in ("a", "b")]
    datasets = tuple(
        make_spec(subset, batch_size=size).datasets[0] for subset, size in zip(subsets, (1, 2), strict=True)
    )
    records = [
        record
        for number, subset in enumerate(subsets)
        for record in write_images(subset.image_dir, [(64, 64)] * 3, dataset=number)
    ]
    data = prepare_data(DataSpec(datasets=datasets, where="a.toml"), records)
    assert [(bucket.dataset, bucket.plan.examples, bucket.plan.batch_size) for bucket in data.buckets] == [
        (0, (0, 1, 2), 1),
        (1, (3, 4, 5), 2),
    ]


def test_regularisation_images_are_counted_apart_and_unused_ones_left_out(tmp_path):
    subsets = [make_subset(tmp_path / "train"), make_subset(tmp_path / "reg", is_reg=True)]
    train = write_images(tmp_path / "train", [(64, 64)] * 2, repeats=3)
    reg = write_images(tmp_path / "reg", [(64, 64)] * 3, subset=1, is_reg=True)
    reg = [replace(record, repeats=repeats) for record, repeats in zip(reg, (4, 2, 0), strict=True)]
    data = prepare_data(make_spec(*subsets), train + reg)
    assert (data.train_examples, data.reg_examples) == (6, 6)
    assert data.examples == (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3)
    assert data.buckets[0].images == 4


def test_mean_aspect_error_is_over_images_without_repeats(tmp_path):
    data = make_data(tmp_path, repeats=7)
    # Three squares fit; 96x48 in 88x40 errs by 2.2 - 2, 48x96 in 40x88 by 1/2 - 5/11.
    assert data.mean_aspect_error(0) == pytest.approx((0.2 + 1 / 22) / 5)


def test_without_buckets_images_cover_the_resolution(tmp_path):
    folder = tmp_path / "a"
    spec = make_spec(make_subset(folder), buckets=BucketRules(enable_bucket=False))
    data = prepare_data(spec, write_images(folder))
    assert {placement.bucket for placement in data.placements} == {(64, 64)}
    assert data.placements[2].resized == (128, 64)


def test_a_random_crop_without_buckets_keeps_the_size_of_large_images(tmp_path):
    folder = tmp_path / "a"
    subset = make_subset(folder, augment=AugmentRules(random_crop=True))
    spec = make_spec(subset, buckets=BucketRules(enable_bucket=False))
    data = prepare_data(spec, write_images(folder, [(100, 80), (100, 50)]))
    assert data.placements == (Placement((64, 64), (100, 80)), Placement((64, 64), (128, 64)))


def test_all_images_that_fit_no_bucket_are_named(tmp_path):
    folder = tmp_path / "a"
    rules = replace(BucketRules(enable_bucket=True), bucket_no_upscale=True)
    with pytest.raises(UserError) as caught:
        prepare_data(
            make_spec(make_subset(folder), buckets=rules), write_images(folder, [(64, 64), (20, 90), (20, 90)])
        )
    assert [problem.where for problem in caught.value.problems] == [str(folder / "1.png"), str(folder / "2.png")]


def test_nothing_to_train_on_is_a_message(tmp_path):
    spec = make_spec(make_subset(tmp_path))
    with pytest.raises(UserError, match="no images"):
        prepare_data(spec, [])
    with pytest.raises(UserError, match="no images"):
        prepare_data(spec, write_images(tmp_path, SIZES, repeats=0))


def test_data_can_be_sent_to_another_process(tmp_path):
    data = make_data(tmp_path)
    assert pickle.loads(pickle.dumps(data)) == data


def test_setting_up_needs_neither_torch_nor_opencv():
    code = "import sys, library.data.setup; sys.exit(bool({'torch', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
