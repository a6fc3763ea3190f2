"""Images to latents and back, through the VAE.

Latents here are the VAE's own: the U-Net sees them multiplied by ``Variant.latent_scale``.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's posterior for each image (Kingma and Welling 2014), in the VAE's precision and the result in float32.

    Args:
        vae: An ``AutoencoderKL``.
        pixels: (B, 3, H, W) in [-1, 1], on any device; H and W multiples of 8.

    Returns:
        Mean and standard deviation, (B, 4, H/8, W/8) each, not scaled.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    return mean, std


def encoder_digest(vae: Any) -> str:
    """BLAKE2b, 64 bits in hexadecimal, of what decides :func:`encode_images`: weights, precision and tiling.

    The decoder is left out, so that VAEs that differ in it alone, as SD's improved ones do, share their latents.
    """
    digest = hashlib.blake2b(b"tiled" if vae.use_tiling else b"", digest_size=8)
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_posterior(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior, (B, 4, h, w): ``mean + std * noise``, with ``noise`` standard normal."""
    return mean + std * noise


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, scale: float) -> Tensor:
    """Images from the U-Net's latents, in the VAE's precision and the result in float32.

    Args:
        vae: An ``AutoencoderKL``.
        latents: (B, 4, h, w) as the U-Net sees them.
        scale: ``Variant.latent_scale``, by which they were multiplied.

    Returns:
        Pixels (B, 3, 8h, 8w) in [-1, 1].
    """
    latents = (latents / scale).to(vae.device, vae.dtype)
    pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels.float().clamp(-1, 1)
