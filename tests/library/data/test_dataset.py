"""Batches from keys."""

import pickle
from dataclasses import fields, replace

import pytest
import torch

from library.data.dataset import TrainingDataset
from library.data.epoch_plan import MicroBatch
from library.data.images import load_view, to_tensor
from library.data.latent_cache import LatentCache
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules, CaptionRules
from library.errors import UserError
from tests.library.data.small_set import (
    encode,
    make_data,
    make_spec,
    make_subset,
    tokenize,
    tokenize_weighted,
    write_images,
)


def make_dataset(data, **changes):
    return TrainingDataset(**{"data": data, "seed": 7, "total_steps": 20, "tokenize": tokenize} | changes)


def same(a, b):
    """Whether two batches are equal in every field."""
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_a_batch_holds_pixels_tokens_captions_and_weights(tmp_path):
    data = make_data(tmp_path)
    batch = make_dataset(data)[MicroBatch(2, 5, (0, 3))]
    assert (batch.epoch, batch.step, batch.examples, batch.is_padding) == (2, 5, (0, 3), False)
    expected = torch.stack([to_tensor(load_view(data.view(record))) for record in (0, 1)])
    torch.testing.assert_close(batch.pixels, expected, rtol=0, atol=0)
    assert batch.pixels.shape == (2, 3, 64, 64)
    assert batch.captions == tuple(f"image {n}, red, green, blue, tall" for n in (0, 1))
    assert batch.input_ids.shape == (2, 1, 77)
    assert batch.input_ids.dtype == torch.int64
    assert torch.equal(batch.input_ids[1], tokenize(batch.captions[1])[0])
    assert batch.loss_weight.tolist() == [1, 1]
    assert batch.loss_weight.dtype == torch.float32
    assert batch.token_weights is batch.mask is batch.latent_mean is batch.latent_std is None


def test_weighted_captions_have_token_weights(tmp_path):
    batch = make_dataset(make_data(tmp_path), tokenize=tokenize_weighted)[MicroBatch(1, 0, (0, 1))]
    assert batch.token_weights.shape == (2, 1, 77)
    assert (batch.token_weights == 1.5).all()


def test_half_of_the_images_are_mirrored_and_the_pixels_follow(tmp_path):
    data = make_data(tmp_path, augment=AugmentRules(flip_aug=True))
    dataset = make_dataset(data)
    flips = [dataset.is_flipped(epoch, example) for epoch in range(1, 101) for example in range(10)]
    assert 420 < sum(flips) < 580
    plain = to_tensor(load_view(data.view(0)))
    seen = set()
    for epoch in range(1, 9):
        batch = dataset[MicroBatch(epoch, 0, (0,))]
        flipped = dataset.is_flipped(epoch, 0)
        assert torch.equal(batch.pixels[0], plain.flip(-1) if flipped else plain)
        seen.add(flipped)
    assert seen == {True, False}


def test_cached_latents_are_mirrored_as_the_pixels_are(tmp_path):
    data = make_data(tmp_path, augment=AugmentRules(flip_aug=True))
    plain = make_dataset(data)
    cached = make_dataset(data, cache=LatentCache.fill(data, encode, batch_size=3, progress=False))
    for epoch in range(1, 9):
        key = MicroBatch(epoch, 0, (0, 2, 8))
        batch = cached[key]
        assert batch.pixels is None
        mean, std = encode(plain[key].pixels)
        torch.testing.assert_close(batch.latent_mean, mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.latent_std, std, rtol=0, atol=1e-6)


def test_repeats_are_different_examples(tmp_path):
    """Examples 0 and 1 are the same image; their draws differ."""
    rules = CaptionRules(shuffle_caption=True)
    dataset = make_dataset(make_data(tmp_path, augment=AugmentRules(flip_aug=True), captions=rules))
    epochs = range(1, 21)
    assert any(dataset.is_flipped(e, 0) != dataset.is_flipped(e, 1) for e in epochs)
    assert any(dataset.example_caption(e, 0, step=0) != dataset.example_caption(e, 1, step=0) for e in epochs)


def test_captions_are_shuffled_anew_each_epoch_and_can_be_foretold(tmp_path):
    dataset = make_dataset(make_data(tmp_path, captions=CaptionRules(shuffle_caption=True, keep_tokens=1)))
    captions = {dataset.example_caption(epoch, 4, step=epoch * 3) for epoch in range(1, 11)}
    assert len(captions) > 3
    assert all(caption.startswith("image 2, ") for caption in captions)
    batch = dataset[MicroBatch(3, 9, (4,))]
    assert batch.captions == (dataset.example_caption(3, 4, step=9),)
    assert torch.equal(batch.input_ids[0], tokenize(batch.captions[0])[0])


def test_the_tag_warm_up_follows_step_and_run_length(tmp_path):
    rules = CaptionRules(token_warmup_min=1, token_warmup_step=0.5)
    dataset = make_dataset(make_data(tmp_path, captions=rules), total_steps=20)
    counts = [dataset.example_caption(1, 0, step=step).count(",") + 1 for step in (0, 5, 10, 19)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[2:] == [5, 5]


@pytest.mark.parametrize("rules", [AugmentRules(random_crop=True), AugmentRules(color_aug=True)])
def test_pixels_change_with_epoch_example_and_seed_but_not_with_neighbours(tmp_path, rules):
    folder = tmp_path / "a"
    subset = make_subset(folder, augment=rules)
    spec = make_spec(subset, buckets=BucketRules(enable_bucket=False))
    data = prepare_data(spec, write_images(folder, [(96, 80)] * 2, repeats=4))
    dataset = make_dataset(data)

    def pixels(dataset, epoch, example):
        return dataset[MicroBatch(epoch, 0, (example,))].pixels[0]

    assert len({pixels(dataset, epoch, 0).numpy().tobytes() for epoch in range(1, 13)}) > 2
    assert any(not torch.equal(pixels(dataset, e, 0), pixels(dataset, e, 1)) for e in range(1, 13))
    assert any(not torch.equal(pixels(dataset, e, 0), pixels(make_dataset(data, seed=8), e, 0)) for e in range(1, 13))
    together = dataset[MicroBatch(3, 0, (5, 0, 2))].pixels
    for position, example in enumerate((5, 0, 2)):
        assert torch.equal(together[position], pixels(dataset, 3, example))


def test_batches_are_pure_and_leave_global_generators_alone(tmp_path):
    import random

    import numpy as np

    rules = AugmentRules(flip_aug=True, color_aug=True, random_crop=True)
    dataset = make_dataset(make_data(tmp_path, augment=rules, captions=CaptionRules(shuffle_caption=True)))
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    key = MicroBatch(1, 0, (0, 2))
    assert same(dataset[key], dataset[key])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_regularisation_images_weigh_the_prior_and_padding_nothing(tmp_path):
    subsets = [make_subset(tmp_path / "train"), make_subset(tmp_path / "reg", is_reg=True)]
    records = write_images(tmp_path / "train", [(64, 64)]) + write_images(
        tmp_path / "reg", [(64, 64)], subset=1, is_reg=True
    )
    dataset = make_dataset(prepare_data(make_spec(*subsets), records), prior_loss_weight=0.25)
    key = MicroBatch(1, 0, (0, 1))
    assert dataset[key].loss_weight.tolist() == [1, 0.25]
    padding = dataset[replace(key, is_padding=True)]
    assert padding.loss_weight.tolist() == [0, 0]
    assert padding.is_padding
    assert torch.equal(padding.pixels, dataset[key].pixels)


def test_a_batch_moves_as_a_whole(tmp_path):
    batch = make_dataset(make_data(tmp_path), tokenize=tokenize_weighted)[MicroBatch(1, 0, (0, 1))]
    moved = batch.to("meta")
    tensors = [getattr(moved, field.name) for field in fields(moved)]
    assert {value.device.type for value in tensors if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.captions == batch.captions
    assert same(batch.to(torch.device("cpu")), batch)


@pytest.mark.parametrize(("device", "expected"), [("cuda", {True}), ("cuda:1", {True}), ("cpu", {False})])
def test_only_for_a_gpu_the_program_goes_on(device, expected, tmp_path, monkeypatch):
    batch = make_dataset(make_data(tmp_path), tokenize=tokenize_weighted)[MicroBatch(1, 0, (0, 1))]
    goes_on = set()
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: goes_on.add(non_blocking) or self)
    batch.to(device)
    assert goes_on == expected


def test_a_damaged_image_is_named(tmp_path):
    data = make_data(tmp_path)
    path = data.records[1].path
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError) as caught:
        make_dataset(data)[MicroBatch(1, 0, (0, 2))]
    assert caught.value.problems[0].where == str(path)


def test_a_dataset_can_be_sent_to_another_process(tmp_path):
    data = make_data(tmp_path, augment=AugmentRules(flip_aug=True))
    key = MicroBatch(1, 0, (0, 2))
    for cache in (None, LatentCache.fill(data, encode, batch_size=2, progress=False)):
        dataset = make_dataset(data, cache=cache)
        copy = pickle.loads(pickle.dumps(dataset))
        assert same(copy[key], dataset[key])
        assert same(pickle.loads(pickle.dumps(dataset[key])), dataset[key])
