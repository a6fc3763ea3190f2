import pytest
import torch

from library.models.latents import decode_latents, encode_images, encoder_digest, sample_posterior
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from tests.tiny import tiny_parts


@pytest.fixture(scope="module")
def vae():
    return tiny_parts("sd1").vae


def test_the_posterior_is_the_vaes(vae):
    pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 48).reshape(2, 3, 64, 48)

    mean, std = encode_images(vae, pixels)

    expected = vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 6)
    assert torch.equal(mean, expected.mean)
    assert torch.equal(std, expected.std)
    torch.testing.assert_close(std, (0.5 * expected.logvar).exp())


def test_a_sample_is_the_mean_and_the_scaled_noise():
    mean, std, noise = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([-2.0])
    assert sample_posterior(mean, std, noise) == torch.tensor([0.0])


def test_decoding_undoes_the_scale_and_stays_in_range(vae):
    latents = torch.ones(1, 4, 8, 8) * 0.3

    pixels = decode_latents(vae, latents * 0.18215, 0.18215)

    expected = vae.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(pixels, expected)
    assert decode_latents(vae, latents * 1000, 1.0).abs().max() <= 1


def test_a_16_bit_vae_gives_float32(vae):
    half = tiny_parts("sd1").vae.to(torch.bfloat16)
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    mean, std = encode_images(half, pixels)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, encode_images(vae, pixels)[0], atol=0.05, rtol=0.05)
    assert decode_latents(half, mean, 1.0).dtype == torch.float32


def test_the_digest_tells_encoders_apart_and_decoders_not():
    vae = tiny_parts("sd1").vae
    digest = encoder_digest(vae)
    assert encoder_digest(tiny_parts("sd1").vae) == digest
    with torch.no_grad():
        vae.decoder.conv_in.weight += 1
        vae.post_quant_conv.weight += 1
        assert encoder_digest(vae) == digest
        assert encoder_digest(tiny_parts("sd1").vae.bfloat16()) != digest
        vae.quant_conv.bias[0] += 1e-3
        assert encoder_digest(vae) != digest
        vae.quant_conv.bias[0] -= 1e-3
        vae.encoder.mid_block.resnets[0].norm1.weight[0] += 1e-3
        assert encoder_digest(vae) != digest


@pytest.mark.parametrize("option", [None, "vae_slicing", "vae_tiling"])
def test_the_vae_works_in_parts(option, tiny_folder):
    given = {} if option is None else {option: True}
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_folder("sd1")), **given)
    vae = load_stable_diffusion(options, PromptOptions()).vae
    # Tiles of the size of a small picture.
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, taken: seen.append(tuple(taken[0].shape)))
    encode_images(vae, torch.zeros(2, 3, 96, 64))
    if option is None:
        assert seen == [(2, 3, 96, 64)]
    elif option == "vae_slicing":
        assert seen == [(1, 3, 96, 64)] * 2
    else:
        assert len(seen) > 1
        assert all(height <= 64 for _, _, height, _ in seen)
