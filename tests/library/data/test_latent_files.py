"""Metadata entries of which only the latents are left: found, verified, trained on as they are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache_conflicts import check_latents_alone
from library.data.cache_entry import read_entry
from library.data.dataset import TrainingDataset
from library.data.disk_cache import DiskLatentCache
from library.data.epoch_plan import MicroBatch
from library.data.file_facts import read_facts
from library.data.latent_cache import LatentCache
from library.data.lint import lint
from library.data.mask_cache import MaskCache
from library.data.options import CacheOptions
from library.data.records import scan
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules
from library.errors import UserError
from tests.library.data.reading import errors
from tests.library.data.small_set import BUCKETS, encode, tokenize
from tests.library.data.test_metadata import only_error, spec_of


def sample(value, width=64, height=64):
    return np.full((4, height // 8, width // 8), value, np.float32)


def newer(path, *, width=64, height=64, size=(640, 640), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "latents": sample(0.5, width, height),
        "latents_flipped": sample(0.25, width, height),
        "original_size": np.array(size),
        "crop_ltrb": np.array([0, 0, 640, 640]),
    }
    np.savez(path, **{name: array for name, array in (arrays | more).items() if array is not None})


def older(path, *, flipped=True, width=64, height=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, sample(0.5, width, height))
    if flipped:
        np.savez(path.with_name(f"{path.stem}_flip.npz"), sample(0.25, width, height))


def described(tmp_path, entries, **changes):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    spec = spec_of(path, tmp_path / "images", **({"buckets": BUCKETS} | changes))
    records, findings = scan(spec)
    return spec, records, findings


def caches(data):
    memory = LatentCache.fill(data, encode, batch_size=2, progress=False)
    disk = DiskLatentCache.fill(data, encode, vae="a", batch_size=2, progress=False)
    return memory, disk


@pytest.mark.parametrize("name", ["a.npz", "a_0640x0640_sd.npz"])
@pytest.mark.parametrize("key", ["a", "a.png", "@/a", "@/a.png"])
def test_latents_beside_the_path_of_a_key_or_in_the_image_folder_are_a_sample(tmp_path, key, name):
    newer(tmp_path / "images" / name)
    key = key.replace("@", (tmp_path / "images").as_posix())
    spec, records, findings = described(tmp_path, {key: {"caption": "c"}})
    assert not errors(findings)
    (record,) = records
    assert (record.path.name, record.size, record.bucket, record.caption) == (name, (640, 640), (64, 64), "c")
    assert not lint(spec, records)
    for cache in caches(prepare_data(spec, records)):
        mean, std = cache.get(0, flipped=False)
        assert torch.equal(mean, torch.full((4, 8, 8), 0.5))
        assert torch.equal(std, torch.zeros(4, 8, 8))


def test_what_cannot_be_verified_is_said_once_a_data_set(tmp_path):
    for number in range(7):
        newer(tmp_path / "images" / f"{number}.npz")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "7.png")
    _, records, findings = described(tmp_path, {str(number): {"caption": "c"} for number in range(8)})
    assert len(records) == 8
    (finding,) = [finding for finding in findings if "latents" in finding.what]
    assert finding.severity == "warning"
    assert finding.what.startswith("7 of 8 entries have latents alone, without an image (for example '0.npz')")
    assert "cannot be verified" in finding.what


def test_an_image_goes_before_its_latents(tmp_path):
    newer(tmp_path / "images" / "a.npz")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    _, (record,), findings = described(tmp_path, {"a": {"caption": "c"}})
    assert record.path.name == "a.png"
    assert not findings


def test_an_older_pair_is_read_with_its_mirrored_file(tmp_path):
    older(tmp_path / "images" / "a.npz", width=80)
    entries = {"a": {"caption": "c", "train_resolution": [80, 64]}}
    spec, records, findings = described(tmp_path, entries, augment=AugmentRules(flip_aug=True))
    assert not errors(findings)
    assert (records[0].size, records[0].bucket) == ((80, 64), (80, 64))
    for cache in caches(prepare_data(spec, records)):
        for flipped, value in ((False, 0.5), (True, 0.25)):
            mean, std = cache.get(0, flipped=flipped)
            assert torch.equal(mean, torch.full((4, 8, 10), value))
            assert not std.any()


@pytest.mark.parametrize(
    ("make", "rules", "entry", "what"),
    [
        (newer, {}, {"train_resolution": [64, 80]}, "of 64x64 pixels, and train_resolution is 64x80"),
        (older, {}, {"train_resolution": [64, 80]}, "of 64x64 pixels, and train_resolution is 64x80"),
        (lambda path: newer(path, latents=np.zeros((16, 8, 8), np.float32)), {}, {}, "have another size"),
        (
            lambda path: newer(path, latents=np.zeros((16, 8, 8), np.float32), latents_flipped=None),
            {},
            {},
            "latents of the shape 16x8x8 are not those",
        ),
        (lambda path: newer(path, width=32), {}, {}, "latents of the shape 4x8x4 are not those"),
        (
            lambda path: newer(path, latents_flipped=None),
            {"augment": AugmentRules(flip_aug=True)},
            {},
            "no mirrored latents, which flip_aug needs",
        ),
        (
            lambda path: older(path, flipped=False),
            {"augment": AugmentRules(flip_aug=True)},
            {},
            "no mirrored latents, which flip_aug needs",
        ),
        (newer, {"alpha_mask": True}, {}, "no alpha_mask"),
        (
            lambda path: newer(path, alpha_mask=np.ones((8, 8), np.float32)),
            {"alpha_mask": True},
            {},
            "an alpha_mask of another size",
        ),
        (lambda path: path.write_bytes(b"PK"), {}, {}, "cannot be used: damaged"),
        (lambda path: newer(path, latents=np.full((4, 8, 8), np.nan)), {}, {}, "not finite"),
    ],
)
def test_geometry_is_verified_and_the_file_named(tmp_path, make, rules, entry, what):
    path = tmp_path / "images" / "a.npz"
    path.parent.mkdir()
    make(path)
    _, records, findings = described(tmp_path, {"a": {"caption": "c"} | entry}, **rules)
    assert records == ()
    finding = only_error(findings)
    assert what in finding.what
    assert finding.where == str(path)
    assert finding.remedy


@pytest.mark.parametrize("is_used", [True, False])
def test_the_mask_in_a_file_is_kept_where_it_is_used(tmp_path, is_used):
    mask = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    newer(tmp_path / "images" / "a.npz", alpha_mask=mask)
    spec, records, _ = described(tmp_path, {"a": {"caption": "c"}}, alpha_mask=is_used)
    found = LatentCache.fill(prepare_data(spec, records), encode, batch_size=1, progress=False).opacity(0)
    if is_used:
        np.testing.assert_array_equal(found, np.rint(mask * 255))
    else:
        assert found is None


def test_several_latents_that_could_be_meant_are_none(tmp_path):
    for name in ("a_0640x0640_sd.npz", "a_0320x0320_sd.npz"):
        newer(tmp_path / "images" / name)
    _, records, findings = described(tmp_path, {"a": {"caption": "c"}})
    assert records == ()
    assert "match no image" in only_error(findings).what


def test_bucket_no_upscale_leaves_latents_as_they_are(tmp_path):
    newer(tmp_path / "images" / "a.npz", width=80)
    buckets = BucketRules(enable_bucket=True, bucket_no_upscale=True)
    spec, records, findings = described(tmp_path, {"a": {"caption": "c"}}, buckets=buckets)
    assert not errors(findings)
    assert prepare_data(spec, records).placements[0].bucket == (80, 64)


def test_latents_and_images_train_together(tmp_path):
    newer(tmp_path / "images" / "a.npz")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "images" / "b.png")
    entries = {name: {"caption": name} for name in "ab"}
    spec, records, _ = described(tmp_path, entries, augment=AugmentRules(flip_aug=True))
    data = prepare_data(spec, records)
    key = MicroBatch(epoch=1, step=0, examples=(0, 1), is_padding=False)
    for cache in caches(data):
        batch = TrainingDataset(data=data, seed=0, total_steps=1, tokenize=tokenize, cache=cache)[key]
        assert batch.latent_mean[0].unique().item() in (0.5, 0.25)
        assert torch.equal(batch.latent_std[0], torch.zeros(4, 8, 8))
        assert batch.latent_std[1].min() > 0
    # Without images there is nothing to decode, and to look at something all the same.
    assert list(read_facts(records)[0]) == [tmp_path / "images" / "b.png"]
    assert TrainingDataset(data=data, seed=0, total_steps=1, tokenize=tokenize)[key].pixels.shape == (2, 3, 64, 64)


def test_without_cache_latents_all_are_cached_and_that_is_said(tmp_path):
    newer(tmp_path / "images" / "a.npz")
    spec, records, _ = described(tmp_path, {"a": {"caption": "c"}})
    (finding,) = check_latents_alone(spec, records, CacheOptions())
    assert finding.severity == "warning"
    assert "as by --cache_latents" in finding.what
    assert not list(check_latents_alone(spec, records, CacheOptions(cache_latents_to_disk=True)))
    assert not list(check_latents_alone(spec, (), CacheOptions()))


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_what_changes_pixels_is_refused_with_the_way_out(tmp_path, name):
    newer(tmp_path / "images" / "a.npz")
    spec, records, _ = described(tmp_path, {"a": {"caption": "c"}}, augment=AugmentRules(**{name: True}))
    finding = only_error(list(check_latents_alone(spec, records, CacheOptions())))
    assert finding.what.startswith(f"{name} changes the pixels each time")
    assert finding.remedy == f"Leave out {name}, or put back the images of which there are latents alone."


def test_the_mask_in_the_file_is_the_mask(tmp_path):
    mask = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    newer(tmp_path / "images" / "a.npz", alpha_mask=mask)
    spec, records, findings = described(tmp_path, {"a": {"caption": "c"}}, alpha_mask=True)
    assert not errors(findings)
    data = prepare_data(spec, records)
    for cache in caches(data):
        levels = MaskCache.fill(data, cache).get(0)
        assert np.abs(levels / 255 - mask).max() <= 0.5 / 255 + 1e-6


def test_our_own_entry_of_a_lost_image_keeps_its_spread(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.effect_noise((64, 64), 80).convert("RGB").save(images / "a.png")
    spec, records, _ = described(tmp_path, {"a": {"caption": "c"}})
    before = caches(prepare_data(spec, records))[1].get(0, flipped=False)
    (images / "a.png").unlink()
    spec, records, findings = described(tmp_path, {"a": {"caption": "c"}})
    assert not errors(findings)
    after = caches(prepare_data(spec, records))[1].get(0, flipped=False)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert after[1].any()


# --- older pairs beside images


def test_an_older_pair_of_an_image_is_used_only_where_metadata_gives_the_size(tmp_path, caplog):
    images = tmp_path / "images"
    older(images / "a.npz")
    Image.new("RGB", (64, 64)).save(images / "a.png")
    for entry, is_used in (({"train_resolution": [64, 64]}, True), ({}, False)):
        spec, records, findings = described(
            tmp_path, {"a": {"caption": "c"} | entry}, augment=AugmentRules(flip_aug=True)
        )
        assert not findings
        for path in images.glob("*_sd.npz"):
            path.unlink()
        cache = DiskLatentCache.fill(prepare_data(spec, records), encode, vae="a", batch_size=1, progress=False)
        mean, std = cache.get(0, flipped=True)
        assert torch.equal(mean, torch.full((4, 8, 8), 0.25)) == is_used
        assert bool(std.any()) != is_used
    assert "in an old format that does not say which image size it is for" in caplog.text


def test_the_file_of_an_image_called_so_is_no_mirrored_half(tmp_path):
    older(tmp_path / "a.npz")
    assert read_entry(tmp_path / "a.npz").mirrored is not None
    Image.new("RGB", (64, 64)).save(tmp_path / "a_flip.png")
    assert read_entry(tmp_path / "a.npz").mirrored is None


def test_masks_of_their_own_work_with_latents_alone(tmp_path):
    newer(tmp_path / "images" / "a.npz", size=(640, 640))
    (tmp_path / "masks").mkdir()
    Image.new("L", (640, 640), 128).save(tmp_path / "masks" / "a.png")
    spec, records, findings = described(tmp_path, {"a": {"caption": "c"}}, conditioning_data_dir=tmp_path / "masks")
    assert not errors(findings)
    data = prepare_data(spec, records)
    memory, _ = caches(data)
    assert set(MaskCache.fill(data, memory).get(0).ravel().tolist()) == {128}


def test_latents_that_change_during_the_run_are_an_error_that_names_them(tmp_path):
    path = tmp_path / "images" / "a.npz"
    newer(path)
    spec, records, _ = described(tmp_path, {"a": {"caption": "c"}})
    cache = DiskLatentCache.fill(prepare_data(spec, records), encode, vae="a", batch_size=1, progress=False)
    newer(path, width=80)
    with pytest.raises(UserError, match="changed during the run"):
        cache.get(0, flipped=False)
    path.unlink()
    with pytest.raises(UserError, match="latents are gone"):
        cache.get(0, flipped=False)
