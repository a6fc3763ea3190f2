"""Timesteps and noise of a batch, drawn example by example from keyed generators.

An example's draws depend on its key alone, so they are the same in whatever batch and process it comes. The exception
is multi-resolution noise, which is divided by the deviation of the whole batch.

The formulas take raw draws; :func:`sample_timesteps`, :func:`sample_noise` and :func:`perturb_noise` make the draws.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.diffusion.options import NoiseOptions
from library.diffusion.schedule import TRAIN_TIMESTEPS
from library.randomness import torch_generator

Key = tuple[int, int, int]
"""What the draws of an example are keyed by: (seed, epoch, example)."""


def sample_timesteps(keys: Sequence[Key], options: NoiseOptions) -> Tensor:
    """A timestep for each example, uniform in [min_timestep, max_timestep): (B,) int64 on the CPU."""
    low = options.min_timestep or 0
    high = TRAIN_TIMESTEPS if options.max_timestep is None else options.max_timestep
    assert 0 <= low < high <= TRAIN_TIMESTEPS, (low, high)
    draws = [torch.randint(low, high, (), generator=generator) for generator in _generators(keys, "timestep")]
    return torch.stack(draws)


def sample_noise(latents: Tensor, keys: Sequence[Key], options: NoiseOptions) -> Tensor:
    """The noise that a model is to find, for latents (B, C, H, W): normal, then offset, then multi-resolution noise."""
    noise = _normal(keys, "noise", latents.shape[1:], latents)
    if options.noise_offset or (options.noise_offset is not None and options.adaptive_noise_scale):
        draws = _normal(keys, "noise_offset", (latents.shape[1], 1, 1), latents)
        strength: Tensor | float = options.noise_offset
        if options.noise_offset_random_strength:
            strength = strength * _uniform(keys, "noise_offset_strength", latents)
        adaptive = options.adaptive_noise_scale or 0.0
        noise = offset_noise(noise, draws, latents, strength=strength, adaptive_scale=adaptive)
    if options.multires_noise_iterations:
        levels = _pyramids(keys, latents, options.multires_noise_iterations, options.multires_noise_discount)
        noise = unit_deviation(noise + levels)
    return noise


def perturb_noise(noise: Tensor, keys: Sequence[Key], options: NoiseOptions) -> Tensor:
    """The noise that is mixed into the latents: ``noise`` (B, C, H, W), plus more of it with input perturbation.

    Ning et al. 2023, https://arxiv.org/abs/2301.11706: the target stays ``noise``.
    """
    if not options.ip_noise_gamma:
        return noise
    strength: Tensor | float = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        strength = strength * _uniform(keys, "input_perturbation_strength", noise)
    return noise + strength * _normal(keys, "input_perturbation", noise.shape[1:], noise)


def offset_noise(
    noise: Tensor, draws: Tensor, latents: Tensor, *, strength: Tensor | float, adaptive_scale: float = 0.0
) -> Tensor:
    """Shift each channel by a constant (https://www.crosslabs.org/blog/diffusion-with-offset-noise).

    Args:
        noise: (B, C, H, W).
        draws: Normal draws, (B, C, 1, 1).
        latents: (B, C, H, W).
        strength: How far to shift: a number, or one an example, (B, 1, 1, 1).
        adaptive_scale: Added to the strength times each channel's absolute mean in ``latents``; the sum is not below 0.
    """
    if adaptive_scale:
        mean = latents.float().mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + adaptive_scale * mean).clamp(min=0)
    return noise + strength * draws


def pyramid_sizes(size: tuple[int, int], ratios: Iterable[float]) -> Iterator[tuple[int, int]]:
    """Height and width of each level of a pyramid for ``size``: level i is ratio**i smaller; ends when a side is 1."""
    for level, ratio in enumerate(ratios):
        height, width = (max(1, int(side / ratio**level)) for side in size)
        yield height, width
        if 1 in (height, width):
            return


def pyramid(levels: Iterable[Tensor], size: tuple[int, int], discount: float) -> Tensor:
    """The sum of noise at several resolutions, level i weighing discount**i.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".

    Args:
        levels: Normal draws, (B, C, h_i, w_i), the finest first; at least one.
        size: Height and width of the result.
        discount: Weight of a level relative to the one before it.

    Returns:
        (B, C, *size).
    """
    total: Tensor | None = None
    for index, level in enumerate(levels):
        scaled = interpolate(level, size=size, mode="bilinear") * discount**index
        total = scaled if total is None else total + scaled
    assert total is not None, "a pyramid has a level"
    return total


def unit_deviation(noise: Tensor) -> Tensor:
    """``noise`` divided by its standard deviation over everything it holds."""
    return noise / noise.std()


def _pyramids(keys: Sequence[Key], latents: Tensor, iterations: int, discount: float) -> Tensor:
    """A pyramid for each example, with ratios between its levels of its own, as noise for ``latents``."""
    channels, height, width = latents.shape[1:]
    size = (height, width)
    examples = []
    for generator in _generators(keys, "multires"):
        ratios = (2 + 2 * torch.rand(iterations, generator=generator)).tolist()
        levels = [torch.randn(1, channels, *level, generator=generator) for level in pyramid_sizes(size, ratios)]
        examples.append(pyramid(levels, size, discount))
    return torch.cat(examples).to(latents.device)


def _generators(keys: Sequence[Key], purpose: str) -> Iterator[torch.Generator]:
    return (torch_generator(seed, purpose, epoch, example) for seed, epoch, example in keys)


def _normal(keys: Sequence[Key], purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal draws, (B, *shape) float32 on the device of ``like``."""
    draws = torch.empty(len(keys), *shape)
    for draw, generator in zip(draws, _generators(keys, purpose), strict=True):
        draw.normal_(generator=generator)
    return draws.to(like.device)


def _uniform(keys: Sequence[Key], purpose: str, like: Tensor) -> Tensor:
    """One draw from [0, 1) an example, (B, 1, 1, 1) float32 on the device of ``like``."""
    draws = [torch.rand(1, 1, 1, generator=generator) for generator in _generators(keys, purpose)]
    return torch.stack(draws).to(like.device)
