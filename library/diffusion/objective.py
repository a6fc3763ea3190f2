"""The training loss: noise is mixed into latents, and a model's finding is compared with what was mixed in."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.diffusion.noise import Key, perturb_noise, sample_noise
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.schedule import TRAIN_TIMESTEPS, NoiseSchedule, Prediction
from library.diffusion.timesteps import timestep_sampler
from library.diffusion.weighting import timestep_weight

Predict = Callable[[Tensor, Tensor], Tensor]
"""A model with its text bound: noisy latents (B, C, H, W) and timesteps (B,) to a prediction (B, C, H, W)."""
Threshold = Callable[[Tensor], Tensor]
"""Timesteps (B,) to the threshold of a Huber loss, (B,)."""

_PLAIN_NOISE: Final = NoiseOptions()


class DenoisingObjective:
    """The loss of a denoising model, made once from the options."""

    def __init__(
        self, schedule: NoiseSchedule, prediction: Prediction, *, noise: NoiseOptions, loss: LossOptions
    ) -> None:
        """Choose what is mixed in, what the model is to find, and how errors and timesteps are weighed."""
        self.schedule = schedule
        self._noise = noise
        self._sample_timesteps = timestep_sampler(noise, schedule, prediction)
        self._target = schedule.velocity if prediction == "v_prediction" else _noise_target
        self._loss = element_loss(loss, schedule)
        self._weight = timestep_weight(loss, prediction)

    def __call__(self, predict: Predict, latents: Tensor, *, keys: Sequence[Key], mask: Tensor | None = None) -> Tensor:
        """The loss of each example.

        The order is fixed: loss of each value, mask, mean of the example, weight of its timestep. The mean is over all
        values, so an example loses weight by what its mask covers.

        Args:
            predict: The model.
            latents: Scaled latents, (B, C, H, W).
            keys: What the draws of each example are keyed by.
            mask: What counts of each image, (B, height, width) in [0, 1] in pixels; None is all of it.

        Returns:
            (B,) float32.
        """
        timesteps = self._sample_timesteps(keys).to(latents.device)
        noise = sample_noise(latents.float(), keys, self._noise)
        mixed_in = perturb_noise(noise, keys, self._noise)
        losses = self._losses(predict, latents, timesteps, noise, mixed_in, mask)
        return losses * self._weight(self.schedule.snr(timesteps))

    def at_timestep(
        self, predict: Predict, latents: Tensor, timestep: int, *, keys: Sequence[Key], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each example at one timestep, to be compared between steps and runs: (B,) float32.

        Plain normal noise, whatever noise is trained with, and no weight for the timestep; so the loss of an example
        does not depend on the batch it comes in. Loss type and mask are those of training.
        """
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise = sample_noise(latents.float(), keys, _PLAIN_NOISE)
        return self._losses(predict, latents, timesteps, noise, noise, mask)

    def _losses(
        self,
        predict: Predict,
        latents: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        mixed_in: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        clean = latents.float()
        noisy = self.schedule.add_noise(clean, mixed_in, timesteps)
        found = predict(noisy.to(latents.dtype), timesteps)
        losses = self._loss(found.float(), self._target(clean, noise, timesteps), timesteps)
        if mask is not None:
            losses = losses * latent_mask(mask.to(losses), (losses.shape[2], losses.shape[3]))
        return losses.mean(dim=(1, 2, 3))


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (B, height, width) in pixels, averaged down to latents of ``size``: (B, 1, *size)."""
    return interpolate(mask[:, None], size=size, mode="area")


def squared_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each value."""
    return (prediction - target) ** 2


def absolute_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error of each value."""
    return (prediction - target).abs()


def smooth_l1_loss(prediction: Tensor, target: Tensor, threshold: Tensor) -> Tensor:
    """Pseudo-Huber loss without the threshold as a factor, 2 (sqrt(d^2 + c^2) - c), of each value.

    Args:
        prediction: (B, ...).
        target: (B, ...).
        threshold: c, above 0, for each example, (B,).
    """
    square = (prediction - target) ** 2
    threshold = threshold.view(-1, *[1] * (square.ndim - 1))
    # sqrt(d^2 + c^2) - c loses its digits for small d; this is the same number.
    return 2 * square / ((square + threshold**2).sqrt() + threshold)


def huber_loss(prediction: Tensor, target: Tensor, threshold: Tensor) -> Tensor:
    """Pseudo-Huber loss 2 c (sqrt(d^2 + c^2) - c) of each value (Song and Dhariwal 2023, arXiv 2310.14189).

    Shapes are those of :func:`smooth_l1_loss`.
    """
    return smooth_l1_loss(prediction, target, threshold) * threshold.view(-1, *[1] * (prediction.ndim - 1))


def constant_threshold(timesteps: Tensor, *, c: float, scale: float) -> Tensor:
    """The same threshold, c * scale, at every timestep."""
    return torch.full_like(timesteps, c * scale, dtype=torch.float32)


def exponential_threshold(timesteps: Tensor, *, c: float, scale: float) -> Tensor:
    """Falls exponentially from ``scale`` at timestep 0 to c * scale at the end."""
    return torch.exp(timesteps * (math.log(c) / TRAIN_TIMESTEPS)) * scale


def snr_threshold(timesteps: Tensor, *, c: float, schedule: NoiseSchedule) -> Tensor:
    """Falls with the noise level from 1 to c: (1 - c) / (1 + sigma)^2 + c."""
    return (1 - c) / (1 + schedule.sigma(timesteps)) ** 2 + c


_PLAIN_LOSSES: Final = {"l2": squared_loss, "l1": absolute_loss}
_HUBER_LOSSES: Final = {"huber": huber_loss, "smooth_l1": smooth_l1_loss}


def _noise_target(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return noise


def element_loss(options: LossOptions, schedule: NoiseSchedule) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Loss of each value as a function of (prediction, target, timesteps)."""
    if options.loss_type in _PLAIN_LOSSES:
        return partial(_without_threshold, _PLAIN_LOSSES[options.loss_type])
    threshold: Threshold
    if options.huber_schedule == "snr":
        threshold = partial(snr_threshold, c=options.huber_c, schedule=schedule)
    else:
        shape = constant_threshold if options.huber_schedule == "constant" else exponential_threshold
        threshold = partial(shape, c=options.huber_c, scale=options.huber_scale)
    return partial(_with_threshold, _HUBER_LOSSES[options.loss_type], threshold)


def _without_threshold(
    loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor, timesteps: Tensor
) -> Tensor:
    return loss(prediction, target)


def _with_threshold(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    threshold: Threshold,
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
) -> Tensor:
    return loss(prediction, target, threshold(timesteps))
