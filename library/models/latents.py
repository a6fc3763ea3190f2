"""Images to latents and back, through the VAE.

Latents here are the VAE's own: the U-Net sees them multiplied by ``Variant.latent_scale``.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_TOLD: "WeakSet[Any]" = WeakSet()
"""VAEs of which it has been said that they overflow."""


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's posterior for each image (Kingma and Welling 2014), in the VAE's precision and the result in float32.

    An image whose activations overflow in 16 bits is encoded again in float32.

    Args:
        vae: An ``AutoencoderKL``.
        pixels: (B, 3, H, W) in [-1, 1], on any device; H and W multiples of 8.

    Returns:
        Mean and standard deviation, (B, 4, H/8, W/8) each, not scaled.
    """
    mean, std = _posterior(vae, pixels)
    if vae.dtype == torch.float32:
        return mean, std
    finite = (mean + std).isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        with _wide(vae):
            for image in (number for number, is_finite in enumerate(finite) if not is_finite):
                mean[image : image + 1], std[image : image + 1] = _posterior(vae, pixels[image : image + 1])
    return mean, std


def _posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


@contextmanager
def _wide(vae: Any) -> Iterator[None]:
    """The VAE in float32 inside the block, which is told once; its weights are the same afterwards."""
    dtype = vae.dtype
    if vae not in _TOLD:
        _TOLD.add(vae)
        log.warning(
            "an image overflows in the VAE's %s, and is done again in float32, as further ones will be; "
            "--no_half_vae does so from the start",
            str(dtype).removeprefix("torch."),
        )
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)


def encoder_digest(vae: Any, weights: Mapping[str, Tensor] | None = None) -> str:
    """BLAKE2b, 64 bits in hexadecimal, of what decides :func:`encode_images`: weights, precision and tiling.

    The decoder is left out, so that VAEs that differ in it alone, as SD's improved ones do, share their latents.

    Args:
        vae: An ``AutoencoderKL``.
        weights: Its weights, where it has not taken them yet.
    """
    digest = hashlib.blake2b(b"tiled" if vae.use_tiling else b"", digest_size=8)
    for name, tensor in sorted((vae.state_dict() if weights is None else weights).items()):
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
    latents = latents.float() / scale
    pixels = _decoded(vae, latents)
    if vae.dtype != torch.float32 and not bool(pixels.isfinite().all()):
        with _wide(vae):
            pixels = _decoded(vae, latents)
    return pixels.clamp(-1, 1)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    return pixels.float()
