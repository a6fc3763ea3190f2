"""The latent cache in memory."""

import pickle
from dataclasses import replace

import pytest
import torch

from library.data.images import load_view, to_tensor
from library.data.latent_cache import LatentCache
from library.data.setup import prepare_data
from library.data.spec import AugmentRules
from library.errors import UserError
from tests.library.data.small_set import encode, make_data, make_spec, make_subset, write_images


def pixels_of(data, record):
    return to_tensor(load_view(data.view(record)))[None]


def latents_in(cache):
    """How many it keeps: what is shared counts once."""
    return sum(len(mean) for mean, _ in cache._stacks.values())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_image_has_its_own_posterior(tmp_path, batch_size):
    data = make_data(tmp_path)
    cache = LatentCache.fill(data, encode, batch_size=batch_size, progress=False)
    assert latents_in(cache) == 5
    for record in range(5):
        mean, std = encode(pixels_of(data, record))
        found_mean, found_std = cache.get(record, flipped=False)
        width, height = data.placements[record].bucket
        assert found_mean.shape == (4, height // 8, width // 8)
        torch.testing.assert_close(found_mean, mean[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found_std, std[0], rtol=0, atol=1e-6)


def test_mirrored_images_are_encoded_mirrored(tmp_path):
    data = make_data(tmp_path, augment=AugmentRules(flip_aug=True))
    cache = LatentCache.fill(data, encode, batch_size=2, progress=False)
    assert latents_in(cache) == 10
    for record in range(5):
        mean, _ = encode(pixels_of(data, record).flip(-1))
        torch.testing.assert_close(cache.get(record, flipped=True)[0], mean[0], rtol=0, atol=1e-6)


def test_only_subsets_that_ask_for_it_are_mirrored(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    subsets = [make_subset(folders[0], augment=AugmentRules(flip_aug=True)), make_subset(folders[1])]
    records = [record for number, folder in enumerate(folders) for record in write_images(folder, subset=number)]
    cache = LatentCache.fill(prepare_data(make_spec(*subsets), records), encode, batch_size=4, progress=False)
    assert latents_in(cache) == 15
    with pytest.raises(KeyError):
        cache.get(5, flipped=True)
    assert cache.get(4, flipped=True)[0].shape == (4, 8, 8)


def test_a_batch_holds_one_bucket_and_never_more_than_asked(tmp_path):
    shapes = []

    def recording(pixels):
        shapes.append(tuple(pixels.shape))
        return encode(pixels)

    LatentCache.fill(make_data(tmp_path, repeats=4), recording, batch_size=2, progress=False)
    assert sorted(shapes) == [(1, 3, 40, 88), (1, 3, 64, 64), (1, 3, 88, 40), (2, 3, 64, 64)]


def test_records_of_the_same_file_share_an_entry_and_unused_ones_have_none(tmp_path):
    first, second, *rest = write_images(tmp_path)
    records = [first, replace(first, subset=1), replace(second, repeats=0)]
    data = prepare_data(make_spec(make_subset(tmp_path), make_subset(tmp_path)), records)
    cache = LatentCache.fill(data, encode, batch_size=4, progress=False)
    assert latents_in(cache) == 1
    assert torch.equal(cache.get(0, flipped=False)[0], cache.get(1, flipped=False)[0])
    with pytest.raises(KeyError):
        cache.get(2, flipped=False)


def test_latents_are_kept_as_float32_without_gradient(tmp_path):
    weight = torch.ones(1, requires_grad=True)

    def half(pixels):
        mean, std = encode(pixels * weight)
        return mean.bfloat16(), std.bfloat16()

    cache = LatentCache.fill(make_data(tmp_path), half, batch_size=2, progress=False)
    mean, std = cache.get(0, flipped=False)
    assert (mean.dtype, std.dtype) == (torch.float32, torch.float32)
    assert not mean.requires_grad


def test_latents_made_in_inference_mode_can_be_trained_on(tmp_path):
    cache = LatentCache.fill(make_data(tmp_path), torch.inference_mode()(encode), batch_size=2, progress=False)
    mean, _ = cache.get(0, flipped=False)
    assert not mean.is_inference()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_image(tmp_path, which, value):
    data = make_data(tmp_path)
    culprit = pixels_of(data, 1)[0]

    def broken(pixels):
        made = encode(pixels)
        for position, one in enumerate(pixels):
            if one.shape == culprit.shape and torch.equal(one, culprit):
                made[which][position, 0, 0, 0] = value
        return made

    with pytest.raises(UserError) as caught:
        LatentCache.fill(data, broken, batch_size=4, progress=False)
    (problem,) = caught.value.problems
    assert problem.where == str(data.records[1].path)
    assert "--no_half_vae" in problem.remedy


def test_all_unreadable_images_are_named_together(tmp_path):
    data = make_data(tmp_path)
    for number in (0, 3):
        path = data.records[number].path
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        LatentCache.fill(data, encode, batch_size=2, progress=False)
    assert {problem.where for problem in caught.value.problems} == {str(data.records[n].path) for n in (0, 3)}


def test_progress_is_shown_with_a_rate(tmp_path, capsys):
    LatentCache.fill(make_data(tmp_path), encode, batch_size=2)
    shown = capsys.readouterr().err
    assert "caching latents" in shown
    assert "5/5" in shown
    assert "image/s" in shown


def test_a_cache_can_be_sent_to_another_process(tmp_path):
    cache = LatentCache.fill(make_data(tmp_path), encode, batch_size=2, progress=False)
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(3, flipped=False)[1], cache.get(3, flipped=False)[1])
