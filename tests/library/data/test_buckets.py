"""Bucket sizes and placements against golden values."""

import json
from pathlib import Path

import pytest

from library.data.buckets import Placement, aspect_error, bucket_resolutions, place
from library.data.spec import BucketRules
from library.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
RESOLUTIONS = json.loads((GOLDEN / "bucket_resolutions.json").read_text())["cases"]
RUNS = json.loads((GOLDEN / "image_to_bucket.json").read_text())["runs"]

WITHOUT_AREA = {(1, 1), (63, 65), (65, 63)}
"""Where the reference divides by zero or makes a bucket of zero width."""


def rules_of(run):
    if not run["enable_bucket"]:
        return BucketRules(enable_bucket=False)
    return BucketRules(
        enable_bucket=True,
        min_bucket_reso=run["min"],
        max_bucket_reso=run["max"],
        bucket_reso_steps=run["step"],
        bucket_no_upscale=run["bucket_no_upscale"],
    )


@pytest.mark.parametrize("case", RESOLUTIONS, ids=lambda c: f"{c['max_reso']}-{c['min']}-{c['max']}-{c['step']}")
def test_bucket_resolutions_are_the_golden_ones(case):
    rules = BucketRules(
        enable_bucket=True, min_bucket_reso=case["min"], max_bucket_reso=case["max"], bucket_reso_steps=case["step"]
    )
    found = [list(size) for size in bucket_resolutions(tuple(case["max_reso"]), rules)]
    assert len(found) == case["count"]
    if "resolutions" in case:
        assert found == case["resolutions"]
    else:
        assert (found[:10], found[-10:]) == (case["first"], case["last"])


def test_without_buckets_the_resolution_is_the_only_size():
    assert bucket_resolutions((512, 768), BucketRules(enable_bucket=False)) == [(512, 768)]


@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r['resolution']}-{r['step']}-{r['bucket_no_upscale']}")
def test_images_are_placed_as_the_golden_ones(run):
    """All 150 sizes, but those whose golden bucket has no area: ours is a message (a listed difference)."""
    resolution, rules = tuple(run["resolution"]), rules_of(run)
    resolutions = bucket_resolutions(resolution, rules)
    assert len(run["rows"]) == 150
    for image, bucket, resized, error, origin, _ in run["rows"]:
        size = tuple(image)
        if run["bucket_no_upscale"] and min(size) < run["step"]:
            assert size in WITHOUT_AREA
            assert bucket is None or 0 in bucket
            with pytest.raises(UserError, match="fits no bucket"):
                place(size, resolution, rules, resolutions)
            continue
        placement = place(size, resolution, rules, resolutions)
        assert placement == Placement(tuple(bucket), tuple(resized)), size
        assert aspect_error(size, placement) == pytest.approx(error, abs=1e-12)
        left = (placement.resized[0] - placement.bucket[0]) // 2
        top = (placement.resized[1] - placement.bucket[1]) // 2
        assert [left, top] == origin


def test_crop_loss_is_the_share_cut_off():
    assert Placement((640, 384), (640, 480)).crop_loss == pytest.approx(0.2)
    assert Placement((512, 512), (512, 512)).crop_loss == 0


@pytest.mark.parametrize("size", [(9000, 40), (40, 9000), (63, 500), (1, 1)])
def test_too_narrow_for_a_bucket_is_a_message(size):
    rules = BucketRules(enable_bucket=True, bucket_no_upscale=True)
    with pytest.raises(UserError, match="bucket_no_upscale"):
        place(size, (512, 512), rules, [])


@pytest.mark.parametrize("size", [(1, 178_000_000), (178_000_000, 1), (60_000, 10)])
def test_an_image_that_would_be_resized_to_gigabytes_is_refused(size):
    rules = BucketRules(enable_bucket=True)
    with pytest.raises(UserError, match="too narrow"):
        place(size, (512, 512), rules, bucket_resolutions((512, 512), rules))
