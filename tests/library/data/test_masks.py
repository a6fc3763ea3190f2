"""Masks: which file belongs to which image, that they go through resize, crop and flip, and mistakes."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import folder_files
from library.data.cache_entry import read_entry
from library.data.dataset import TrainingDataset
from library.data.disk_cache import DiskLatentCache
from library.data.epoch_plan import MicroBatch
from library.data.image_headers import size_of_many
from library.data.images import decode
from library.data.latent_cache import LatentCache
from library.data.lint import lint
from library.data.mask_cache import MaskCache
from library.data.masks import load_mask, mask_levels
from library.data.records import scan
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules
from library.data.summary import startup_table
from library.diffusion.objective import latent_mask
from library.errors import UserError
from tests.library.data.reading import errors, make_images, read, write
from tests.library.data.small_set import encode, make_spec, make_subset, tokenize

CROPPING = BucketRules(enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)


def save(path, levels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(levels, np.uint8), mode).save(path)


def make_set(tmp_path, *, size=(80, 60), count=2, alpha=False, buckets=CROPPING, **changes):
    """Images whose red channel is their mask, too: what happens to the one must happen to the other."""
    folder, masks = tmp_path / "images", tmp_path / "masks"
    rng = np.random.default_rng(0)
    for number in range(count):
        # Smooth, so that the filters of images and masks agree.
        small = Image.fromarray(rng.integers(0, 256, (5, 5), np.uint8))
        red = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
        if alpha:
            save(folder / f"{number}.png", np.stack([red, red, red, red], axis=-1))
        else:
            save(folder / f"{number}.png", np.stack([red, 255 - red, red // 2], axis=-1))
            save(masks / f"{number}.png", red)
    own = {"alpha_mask": True} if alpha else {"conditioning_data_dir": masks}
    subset = make_subset(folder, class_tokens="a thing", **(own | changes))
    spec = make_spec(subset, buckets=buckets)
    records, findings = scan(spec)
    return prepare_data(spec, records), spec, [*findings, *lint(spec, records)]


def dataset_of(data, **changes):
    return TrainingDataset(data=data, seed=3, total_steps=10, tokenize=tokenize, **changes)


def key(epoch=1, examples=(0, 1)):
    return MicroBatch(epoch=epoch, step=0, examples=examples, is_padding=False)


@pytest.mark.parametrize("augment", [{}, {"flip_aug": True}, {"random_crop": True}], ids=str)
def test_a_mask_follows_its_image(tmp_path, augment):
    data, _, findings = make_set(tmp_path, augment=AugmentRules(**augment))
    assert not findings
    dataset = dataset_of(data)
    for epoch in range(1, 6):
        batch = dataset[key(epoch)]
        assert batch.mask.shape == batch.pixels.shape[:1] + batch.pixels.shape[2:]
        red = (batch.pixels[:, 0] + 1) / 2
        torch.testing.assert_close(batch.mask, red, rtol=0, atol=2.5 / 255)


def test_flips_and_crops_really_differ_between_epochs(tmp_path):
    data, _, _ = make_set(tmp_path, augment=AugmentRules(flip_aug=True, random_crop=True))
    dataset = dataset_of(data)
    assert len({dataset[key(epoch)].mask.numpy().tobytes() for epoch in range(1, 9)}) > 4


def test_transparency_is_the_mask_where_asked_for(tmp_path):
    data, _, findings = make_set(tmp_path, alpha=True, augment=AugmentRules(flip_aug=True))
    assert not findings
    batch = dataset_of(data)[key()]
    # Grey a on white with opacity a: a * a + (1 - a).
    expected = batch.mask * batch.mask + 1 - batch.mask
    torch.testing.assert_close((batch.pixels[:, 0] + 1) / 2, expected, rtol=0, atol=4 / 255)


@pytest.mark.parametrize("alpha", [False, True])
def test_cached_latents_have_masks_too(tmp_path, alpha):
    data, _, _ = make_set(tmp_path, augment=AugmentRules(flip_aug=True), alpha=alpha)
    cache = LatentCache.fill(data, encode, batch_size=2, progress=False)
    masks = pickle.loads(pickle.dumps(MaskCache.fill(data, cache)))
    assert len(masks) == 2
    plain_batches = {epoch: dataset_of(data)[key(epoch)] for epoch in range(1, 4)}
    for record in data.records:
        # What is cached is not read again.
        record.path.unlink()
    for epoch, plain in plain_batches.items():
        cached = dataset_of(data, cache=cache, masks=masks)[key(epoch)]
        assert torch.equal(cached.mask, plain.mask)
        # What the loss makes of it has the size of the latents.
        assert latent_mask(cached.mask, cached.latent_mean.shape[-2:]).shape[-2:] == cached.latent_mean.shape[-2:]


def test_masks_that_cannot_be_cached_are_all_named(tmp_path):
    data, _, _ = make_set(tmp_path, count=3)
    for number in (0, 2):
        data.records[number].mask.write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        MaskCache.fill(data, LatentCache.fill(data, encode, batch_size=2, progress=False))
    assert [problem.where[-5:] for problem in caught.value.problems] == ["0.png", "2.png"]


def test_only_masks_are_cached(tmp_path):
    data, _, _ = make_set(tmp_path)
    none = replace(data, records=tuple(replace(record, mask=None) for record in data.records))
    masks = MaskCache.fill(none, LatentCache.fill(none, encode, batch_size=2, progress=False))
    assert len(masks) == 0
    assert dataset_of(none, masks=masks)[key()].mask is None


def test_the_first_screen_names_the_masks(tmp_path):
    data, spec, _ = make_set(tmp_path)
    assert "; masks: 2 images" in startup_table(spec, data, str)


def test_without_masks_a_batch_has_none_and_an_image_without_is_whole(tmp_path):
    data, _, _ = make_set(tmp_path)
    first, second = data.records
    whole = replace(data, records=(replace(first, mask=None), second))
    batch = dataset_of(whole)[key()]
    assert bool((batch.mask[0] == 1).all())
    assert not bool((batch.mask[1] == 1).all())
    none = replace(data, records=(replace(first, mask=None), replace(second, mask=None)))
    assert dataset_of(none)[key()].mask is None
    assert pickle.loads(pickle.dumps(dataset_of(data)))[key()].mask is not None


def test_a_mask_of_another_size_is_fitted(tmp_path):
    data, _, _ = make_set(tmp_path, count=1)
    full = load_mask(data.view(0), data.records[0].mask, use_alpha=False)
    Image.open(data.records[0].mask).resize((160, 120), Image.Resampling.BICUBIC).save(data.records[0].mask)
    double = load_mask(data.view(0), data.records[0].mask, use_alpha=False)
    assert double.shape == full.shape
    assert np.abs(double.astype(int) - full).max() <= 8


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((2, 2), 100), 100),
        (np.full((2, 2, 3), (30, 200, 200)), 30),
        # White drawn on nothing: where nothing is, nothing is learnt.
        (np.full((2, 2, 4), (255, 255, 255, 0)), 0),
        (np.full((2, 2, 4), (255, 255, 255, 255)), 255),
        (np.full((2, 2, 4), (200, 0, 0, 128)), 100),
    ],
)
def test_the_red_channel_on_black_is_the_mask(tmp_path, pixels, expected):
    save(tmp_path / "mask.png", pixels)
    levels = mask_levels(tmp_path / "image.png", tmp_path / "mask.png", use_alpha=False)
    assert np.abs(levels.astype(int) - expected).max() <= 1


def test_an_image_without_transparency_counts_whole(tmp_path):
    save(tmp_path / "image.png", np.zeros((2, 2, 3)))
    assert mask_levels(tmp_path / "image.png", None, use_alpha=True) is None


def test_a_mask_that_has_gone_is_named(tmp_path):
    data, _, _ = make_set(tmp_path)
    data.records[0].mask.unlink()
    with pytest.raises(UserError) as caught:
        dataset_of(data)[key()]
    assert caught.value.problems[0].where.endswith("0.png")


# --- findings ---


def test_masks_are_found_by_name_or_stem(tmp_path):
    make_images(tmp_path / "images", 2)
    for name in ("0.jpg", "1.png", "1.jpg"):
        save(tmp_path / "masks" / name, np.tile([0, 255], (64, 32)))
    spec = make_spec(make_subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks", class_tokens="a"))
    records, findings = scan(spec)
    assert [record.mask.name for record in records] == ["0.jpg", "1.png"]
    assert ["1 masks in" in finding.what for finding in findings] == [True]


def test_subsets_may_share_a_folder_of_masks(tmp_path):
    subsets = []
    for name in ("a", "b"):
        make_images(tmp_path / name, 1)
        (tmp_path / name / "0.png").rename(tmp_path / name / f"{name}.png")
        save(tmp_path / "masks" / f"{name}.png", np.tile([0, 255], (64, 32)))
        subsets.append(make_subset(tmp_path / name, conditioning_data_dir=tmp_path / "masks", class_tokens="a"))
    records, findings = scan(make_spec(*subsets))
    assert [record.mask.name for record in records] == ["a.png", "b.png"]
    assert not findings


def test_missing_masks_are_named(tmp_path):
    make_images(tmp_path / "images", 9)
    save(tmp_path / "masks" / "4.png", np.zeros((64, 64)))
    spec = make_spec(make_subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks", class_tokens="a"))
    (finding,) = errors(scan(spec)[1])
    assert "8 of 9 images" in finding.what
    assert "0.png, 1.png, 2.png, 3.png, 5.png and 3 more" in finding.what
    assert "'0.png'" in finding.remedy


def test_a_missing_folder_of_masks_names_its_neighbour(tmp_path):
    make_images(tmp_path / "images")
    make_images(tmp_path / "masks")
    subset = make_subset(tmp_path / "images", conditioning_data_dir=tmp_path / "maks", class_tokens="a")
    (finding,) = errors(scan(make_spec(subset))[1])
    assert "folder not found" in finding.what
    assert f"conditioning_data_dir = '{tmp_path / 'masks'}'" in finding.remedy


@pytest.mark.parametrize(
    ("levels", "severity", "what"),
    [
        (np.full((60, 80), 255), "warning", "are white: they change nothing"),
        (np.zeros((60, 80)), "error", "are black: nothing is left"),
        (np.tile([0, 255], (80, 30)), "error", "do not have the shape of their image: 0.png 60x80 for 80x60"),
    ],
)
def test_masks_that_cannot_do_what_they_are_for(tmp_path, levels, severity, what):
    _, spec, _ = make_set(tmp_path)
    for number in range(2):
        save(tmp_path / "masks" / f"{number}.png", levels)
    findings = [finding for finding in lint(spec, scan(spec)[0]) if what in finding.what]
    assert [finding.severity for finding in findings] == [severity]


def test_a_damaged_mask_is_named(tmp_path):
    _, spec, _ = make_set(tmp_path)
    (tmp_path / "masks" / "1.png").write_bytes(b"no image")
    (finding,) = errors(lint(spec, scan(spec)[0]))
    assert "1 masks of 'images' cannot be read: 1.png" in finding.what


def test_alpha_mask_without_transparency_is_remarked_on(tmp_path):
    make_images(tmp_path / "images", 2)
    spec = make_spec(make_subset(tmp_path / "images", alpha_mask=True, class_tokens="a"))
    (finding,) = lint(spec, scan(spec)[0])
    assert (finding.severity, "are opaque" in finding.what) == ("warning", True)


# --- dataset files and flags ---


SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n{}\n"


def test_masks_and_their_switch_belong_together(tmp_path):
    with_folder = write(tmp_path, SUBSET.format("conditioning_data_dir = 'm'"))
    (finding,) = read(with_folder)[1]
    assert "not switched on" in finding.what
    assert finding.where.endswith(":2")
    assert not read(with_folder, masked=True)[1]
    (finding,) = read(write(tmp_path, SUBSET.format("")), masked=True)[1]
    assert "no masks" in finding.what
    # Transparency masks with and without the switch.
    alpha = write(tmp_path, SUBSET.format("alpha_mask = true"))
    assert not read(alpha)[1]
    assert not read(alpha, masked=True)[1]
    assert not read(write(tmp_path, SUBSET.format("")), masked=True, alpha_mask=True)[1]


def test_a_folder_of_masks_is_found_beside_the_dataset_file(tmp_path):
    make_images(tmp_path / "m")
    path = write(tmp_path, SUBSET.format("conditioning_data_dir = 'm'"))
    assert read(path, masked=True)[0].datasets[0].subsets[0].conditioning_data_dir == tmp_path / "m"
    (finding,) = errors(read(path, masked=True, masks=tmp_path / "m")[1])
    assert "not used with a dataset file" in finding.what


def test_masks_of_named_folders_lie_in_folders_of_the_same_name_or_together(tmp_path):
    make_images(tmp_path / "train" / "2_dog")
    make_images(tmp_path / "train" / "2_cat")
    make_images(tmp_path / "reg" / "1_dog")
    make_images(tmp_path / "masks" / "2_dog")
    spec, findings = read(train=tmp_path / "train", reg=tmp_path / "reg", masks=tmp_path / "masks", masked=True)
    assert not findings
    folders = [subset.conditioning_data_dir for subset in spec.datasets[0].subsets]
    assert folders == [tmp_path / "masks", tmp_path / "masks" / "2_dog", None]


def test_metadata_sets_have_masks_too(tmp_path):
    make_images(tmp_path / "images")
    save(tmp_path / "masks" / "0.png", np.tile([0, 255], (64, 32)))
    path = write(tmp_path, '{"0": {"caption": "c"}}', "meta.json")
    spec, findings = read(in_json=path, train=tmp_path / "images", masks=tmp_path / "masks", masked=True)
    assert not findings
    assert scan(spec)[0][0].mask == tmp_path / "masks" / "0.png"


# --- transparency and the cache


class Decodes:
    """Counts how often files are decoded."""

    def __init__(self, monkeypatch):
        self.paths = []

        def counted(path):
            self.paths.append(path)
            return decode(path)

        monkeypatch.setattr("library.data.images.decode", counted)
        monkeypatch.setattr("library.data.masks.decode", counted)


def test_without_a_cache_an_image_with_transparency_is_decoded_once_a_use(tmp_path, monkeypatch):
    data, _, _ = make_set(tmp_path, alpha=True, augment=AugmentRules(flip_aug=True, random_crop=True))
    decodes = Decodes(monkeypatch)
    assert dataset_of(data)[key()].mask is not None
    assert sorted(path.name for path in decodes.paths) == ["0.png", "1.png"]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_caching_decodes_an_image_once_for_latents_and_mask(tmp_path, monkeypatch, kind):
    data, _, _ = make_set(tmp_path, alpha=True)
    plain = dataset_of(data)[key()].mask
    decodes = Decodes(monkeypatch)

    def filled():
        if kind == "memory":
            return LatentCache.fill(data, encode, batch_size=2, progress=False)
        return DiskLatentCache.fill(data, encode, vae="a", batch_size=2, progress=False)

    cache = filled()
    masks = MaskCache.fill(data, cache)
    assert len(decodes.paths) == 2
    assert torch.equal(dataset_of(data, cache=cache, masks=masks)[key()].mask, plain)
    if kind == "disk":
        assert torch.equal(dataset_of(data, cache=cache, masks=MaskCache.fill(data, filled()))[key()].mask, plain)
        assert len(decodes.paths) == 2


def test_the_entry_holds_the_mask_as_other_programs_do(tmp_path):
    data, _, _ = make_set(tmp_path, alpha=True, size=(64, 64))
    DiskLatentCache.fill(data, encode, vae="a", batch_size=2, progress=False)
    with np.load(tmp_path / "images" / "0_0064x0064_sd.npz") as archive:
        assert archive["alpha_mask"].dtype == np.float32
        assert archive["alpha_mask"].shape == (64, 64)
        expected = np.asarray(Image.open(tmp_path / "images" / "0.png"))[..., 3] / np.float32(255)
        np.testing.assert_array_equal(archive["alpha_mask"], expected)


def test_an_entry_without_the_mask_is_made_anew_only_where_it_is_needed(tmp_path, caplog):
    data, _, _ = make_set(tmp_path, alpha=True)
    rules = {place: replace(own, alpha_mask=False) for place, own in data.rules.items()}
    without = replace(data, rules=rules)
    folder = tmp_path / "images"

    def fill(of):
        DiskLatentCache.fill(of, encode, vae="a", batch_size=2, progress=False)
        return {path.name: path.read_bytes() for path in folder.glob("*.npz")}

    first = fill(without)
    second = fill(data)
    assert first.keys() == second.keys()
    assert "2 made anew: without the mask of the image's transparency" in caplog.text
    assert fill(without) == second


def test_mirrored_latents_and_masks_are_kept_when_the_other_is_added(tmp_path):
    data, _, _ = make_set(tmp_path, alpha=True, augment=AugmentRules(flip_aug=True))
    rules = {place: replace(own, alpha_mask=False) for place, own in data.rules.items()}
    DiskLatentCache.fill(replace(data, rules=rules), encode, vae="a", batch_size=2, progress=False)
    rules = {place: replace(own, augment=AugmentRules()) for place, own in data.rules.items()}
    DiskLatentCache.fill(replace(data, rules=rules), encode, vae="a", batch_size=2, progress=False)
    entries = [read_entry(path) for path in (tmp_path / "images").glob("*.npz")]
    assert len(entries) == 2
    for entry in entries:
        assert entry.mirrored is not None
        assert entry.mask is not None


def test_the_sizes_of_many_masks_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_files, "_WORTH_KEEPING", 2)
    read = []

    def noted(path):
        read.append(Path(path).relative_to(tmp_path).as_posix())
        return size_of_many(path)

    monkeypatch.setattr(folder_files, "size_of_many", noted)
    _, spec, _ = make_set(tmp_path, count=3)
    masks = sorted((tmp_path / "masks").iterdir())
    for path in (*masks, *(tmp_path / "images").iterdir()):
        os.utime(path, (1e9, 1e9))

    def checked():
        read.clear()
        records, findings = scan(spec)
        return errors([*findings, *lint(spec, records)])

    assert not checked()
    assert {"masks/0.png", "images/0.png"} <= set(read)
    assert not checked()
    assert not read
    # One that was changed is looked at again, though nothing else tells that its shape is another one.
    save(masks[1], np.zeros((60, 10)))
    assert "1.png 10x60 for 80x60" in str(checked()[0])
    assert read == ["masks/1.png"]
