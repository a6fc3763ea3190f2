"""A VAE in 16 bits whose numbers overflow for some images: those are done again in 32."""

import copy
import logging

import pytest
import torch

from library.models.latents import decode_latents, encode_images
from tests.tiny import tiny_parts


def overflowing() -> torch.nn.Module:
    """A VAE in fp16 whose first layers go beyond 65504 unless what they are given is small."""
    vae = tiny_parts("sd1").vae
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(3e5)
        vae.decoder.conv_in.weight.mul_(3e5)
    return vae.half()


def test_only_images_that_overflow_are_encoded_again(caplog: pytest.LogCaptureFixture) -> None:
    vae = overflowing()
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    small = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    large = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert not vae.encode(large.half()).latent_dist.mean.isfinite().all()
    with caplog.at_level(logging.WARNING):
        mean, std = encode_images(vae, torch.cat([small, large]))
    exact = encode_images(copy.deepcopy(vae).float(), large)
    assert torch.equal(mean[1:], exact[0])
    assert torch.equal(std[1:], exact[1])
    assert torch.allclose(mean[:1], vae.encode(small.half()).latent_dist.mean.float(), rtol=1e-2, atol=1e-2)
    assert vae.dtype == torch.float16
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vae.state_dict().items())
    encode_images(vae, large)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("library")]
    assert len(said) == 1
    assert "overflows in the VAE's float16" in said[0]


def test_previews_are_not_black() -> None:
    vae = overflowing()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    assert not vae.decode(latents.half()).sample.isfinite().all()
    pixels = decode_latents(vae, latents, 1.0)
    assert torch.equal(pixels, decode_latents(copy.deepcopy(vae).float(), latents, 1.0))
    assert pixels.std() > 0
