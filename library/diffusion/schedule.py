"""How much of an image is left at each timestep: the noise schedule of Stable Diffusion.

Notation of Ho et al. 2020 (https://arxiv.org/abs/2006.11239): a latent z and noise e give
``z_t = sqrt(a_t) z + sqrt(1 - a_t) e``, where a_t is the product of all ``1 - beta`` up to t (``alphas_cumprod``).
"""

from typing import Final, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]

TRAIN_TIMESTEPS: Final = 1000
BETA_START: Final = 0.00085
BETA_END: Final = 0.012


class NoiseSchedule:
    """A noise schedule, with the quantities that training asks of it.

    Timesteps are (B,) int64 in [0, 1000), on any device; results are on the device of the tensors they are made for.

    Args:
        betas: Variance added at each timestep, (T,) float32.

    Attributes:
        alphas_cumprod: Share of the image's variance that is left, (T,) float32, falling.
    """

    def __init__(self, betas: Tensor) -> None:
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self._copies = {self.alphas_cumprod.device: self.alphas_cumprod}

    @classmethod
    def stable_diffusion(cls, *, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """The schedule of Stable Diffusion 1 and 2 ("scaled linear"): the square roots of the betas are evenly spaced.

        Args:
            zero_terminal_snr: Whether to rescale it so that nothing of the image is left at the last timestep.
        """
        betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
        return cls(rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, C, H, W) with noise of the same shape mixed in, as far as the timesteps say."""
        kept = self._at(timesteps, latents)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction, ``sqrt(a_t) e - sqrt(1 - a_t) z``, (B, C, H, W).

        Salimans and Ho 2022, https://arxiv.org/abs/2202.00512.
        """
        kept = self._at(timesteps, latents)
        return kept.sqrt() * noise - (1 - kept).sqrt() * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio a_t / (1 - a_t), (B,) on the timesteps' device; 0 where no image is left."""
        kept = self._on(timesteps.device)[timesteps]
        return kept / (1 - kept)

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise level sqrt((1 - a_t) / a_t), (B,) on the timesteps' device; infinite where no image is left."""
        return self.snr(timesteps).rsqrt()

    def _on(self, device: torch.device) -> Tensor:
        """``alphas_cumprod`` on ``device``, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.alphas_cumprod.to(device)
        return self._copies[device]

    def _at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """a_t as (B, 1, ...), to multiply with ``like`` (B, ...)."""
        kept = self._on(like.device)[timesteps.to(like.device)]
        return kept.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) rescaled so that the last timestep has no signal left.

    Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1.
    """
    kept = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = kept[0].clone(), kept[-1].clone()
    kept = ((kept - last) * first / (first - last)) ** 2
    return 1.0 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
