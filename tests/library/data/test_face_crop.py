"""Crops around a face whose place the file name tells."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.dataset import TrainingDataset
from library.data.epoch_plan import MicroBatch
from library.data.face_crop import Face, crop_around, face_of
from library.data.lint import lint
from library.data.records import scan
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules
from tests.library.data.reading import errors, make_images, read, write
from tests.library.data.small_set import make_spec, make_subset, tokenize

NO_BUCKETS = BucketRules()


@pytest.mark.parametrize(
    ("stem", "face"),
    [
        ("anna_100_80_30_40", Face(100, 80, 40)),
        ("anna_b_0_8_30_4", Face(0, 8, 30)),
        ("anna", None),
        ("100_80_30_40", None),
        ("anna_100_80_30", None),
        ("anna_100_80_30_0", None),
        ("anna_100_80_-3_40", None),
    ],
)
def test_the_name_tells_where_the_face_is(stem, face):
    assert face_of(stem) == face


def test_a_fixed_range_shows_the_face_in_the_middle_at_its_size():
    """Face of 50 pixels, crop of 64 that is twice the face: shrunk by 64 / 100, so the face is at 128, 96."""
    placement, origin = crop_around(Face(200, 150, 50), (400, 300), (64, 64), (2.0, 2.0), Random(0), random_crop=False)
    assert placement.resized == (256, 192)
    assert placement.bucket == (64, 64)
    assert origin == (128 - 32, 96 - 32)


def test_the_range_limits_how_large_the_face_is_shown():
    sizes = set()
    for seed in range(200):
        placement, _ = crop_around(
            Face(200, 150, 50), (400, 300), (64, 64), (1.5, 3.0), Random(seed), random_crop=False
        )
        sizes.add(64 / (50 * placement.resized[0] / 400))
    assert 1.45 <= min(sizes) < 1.6
    assert 2.8 < max(sizes) <= 3.05


@given(
    x=st.integers(0, 300),
    y=st.integers(0, 200),
    side=st.integers(1, 400),
    low=st.floats(0.1, 10),
    more=st.floats(0, 5),
    width=st.integers(64, 300),
    height=st.integers(48, 200),
    random_crop=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_crop_is_always_inside_and_never_enlarged(x, y, side, low, more, width, height, random_crop, seed):
    placement, (left, top) = crop_around(
        Face(x, y, side), (width, height), (64, 48), (low, low + more), Random(seed), random_crop=random_crop
    )
    resized = placement.resized
    assert 64 <= resized[0] <= width
    assert 48 <= resized[1] <= height
    assert 0 <= left <= resized[0] - 64
    assert 0 <= top <= resized[1] - 48


def face_set(tmp_path, **augment):
    """A white face on black, and a mask of it."""
    pixels = np.zeros((200, 300), np.uint8)
    pixels[60:80, 210:230] = 255
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / folder / "anna_220_70_20_20.png")
    subset = make_subset(
        tmp_path / "images",
        class_tokens="anna",
        augment=AugmentRules(**augment),
        conditioning_data_dir=tmp_path / "masks",
    )
    spec = make_spec(subset, buckets=NO_BUCKETS, batch_size=1)
    records, findings = scan(spec)
    assert not findings
    assert not lint(spec, records)
    return TrainingDataset(data=prepare_data(spec, records), seed=1, total_steps=1, tokenize=tokenize)


@pytest.mark.parametrize("flip_aug", [False, True])
def test_the_face_is_in_the_crop_and_the_mask_follows(tmp_path, flip_aug):
    dataset = face_set(tmp_path, face_crop_aug_range=(1.6, 3.2), flip_aug=flip_aug)
    shown = set()
    for epoch in range(1, 9):
        batch = dataset[MicroBatch(epoch=epoch, step=0, examples=(0,), is_padding=False)]
        assert batch.pixels.shape == (1, 3, 64, 64)
        assert (batch.mask - (batch.pixels[:, 0] + 1) / 2).abs().max() < 0.02
        # Its 20 pixels are not enlarged, and shrunk to 64 / 3.2 = 20 at the least.
        assert batch.mask[0, 28:36, 28:36].min() == 1
        assert 18**2 <= batch.mask.sum() <= 22**2
        shown.add(batch.pixels.numpy().tobytes())
    assert len(shown) > 1


def test_an_image_without_a_face_in_its_name_has_the_resolution(tmp_path):
    make_images(tmp_path, 1, (100, 100))
    rules = AugmentRules(face_crop_aug_range=(1.0, 2.0))
    spec = make_spec(make_subset(tmp_path, class_tokens="a", augment=rules), buckets=NO_BUCKETS, batch_size=1)
    findings = lint(spec, scan(spec)[0])
    assert [finding.severity for finding in findings] == ["warning", "warning"]
    assert "no image" in findings[0].what
    assert "are not 64x64" in findings[1].what
    make_images(tmp_path / "same", 1, (64, 64))
    (tmp_path / "same" / "0.png").rename(tmp_path / "same" / "0_1_1_1_1.png")
    spec = make_spec(make_subset(tmp_path / "same", class_tokens="a", augment=rules), buckets=NO_BUCKETS, batch_size=1)
    assert not lint(spec, scan(spec)[0])


def test_with_buckets_it_has_no_effect_and_that_is_said(tmp_path):
    make_images(tmp_path, 1, (100, 64))
    (tmp_path / "0.png").rename(tmp_path / "0_50_32_20_20.png")
    spec = make_spec(
        make_subset(tmp_path, class_tokens="a", augment=AugmentRules(face_crop_aug_range=(1.0, 2.0))), batch_size=1
    )
    records, _ = scan(spec)
    assert "no effect with buckets" in lint(spec, records)[0].what
    data = prepare_data(spec, records)
    assert data.face(0) is None
    dataset = TrainingDataset(data=data, seed=1, total_steps=1, tokenize=tokenize)
    batches = [dataset[MicroBatch(epoch=epoch, step=0, examples=(0,), is_padding=False)] for epoch in (1, 2)]
    assert batches[0].pixels.equal(batches[1].pixels)


def test_it_cannot_be_cached(tmp_path):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nface_crop_aug_range = [1.0, 2.0]\n"
    (finding,) = errors(read(write(tmp_path, text), cache=True)[1])
    assert "face_crop_aug_range changes the pixels" in finding.what
    assert not read(write(tmp_path, text))[1]
