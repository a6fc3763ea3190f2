"""How much each timestep counts in the loss: weights as functions of the signal-to-noise ratio, (B,) -> (B,).

All are finite for every ratio from 0 (the last timestep of a zero-terminal schedule) upwards.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from library.diffusion.options import LossOptions
from library.diffusion.schedule import Prediction

Weight = Callable[[Tensor], Tensor]

MAX_SNR: Final = 1000.0
MIN_SNR: Final = 0.0046819
"""Ratio of Stable Diffusion's ordinary last timestep. Weights that divide by the ratio take no smaller one, so that
zero-terminal schedules give them no larger weight than the ordinary schedule does."""


def timestep_weight(options: LossOptions, prediction: Prediction) -> Weight:
    """The product of all weights that ``options`` ask for, as one function of the ratio."""
    velocity = prediction == "v_prediction"
    factors: list[Weight] = []
    if options.min_snr_gamma:
        factors.append(partial(min_snr_velocity if velocity else min_snr_noise, gamma=options.min_snr_gamma))
    if options.scale_v_pred_loss_like_noise_pred:
        assert velocity, "a velocity loss is scaled"
        factors.append(noise_like)
    if options.v_pred_like_loss:
        assert not velocity, "a noise loss is extended"
        factors.append(partial(velocity_like, share=options.v_pred_like_loss))
    if options.debiased_estimation_loss:
        factors.append(debiased_velocity if velocity else debiased_noise)
    return partial(_product, factors)


def min_snr_noise(snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight for noise prediction, min(snr, gamma) / snr (Hang et al. 2023, arXiv 2303.09556)."""
    return (gamma / snr).clamp(max=1.0)


def min_snr_velocity(snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight for v-prediction, min(snr, gamma) / (snr + 1)."""
    return snr.clamp(max=gamma) / (snr + 1)


def noise_like(snr: Tensor) -> Tensor:
    """Makes a velocity loss weigh timesteps as a noise loss does: snr / (snr + 1)."""
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1)


def velocity_like(snr: Tensor, share: float) -> Tensor:
    """Adds ``share`` of a loss weighted as a velocity loss to a noise loss: 1 + share * (snr + 1) / snr."""
    snr = snr.clamp(MIN_SNR, MAX_SNR)
    return 1 + share * (snr + 1) / snr


def debiased_noise(snr: Tensor) -> Tensor:
    """Debiased estimation for noise prediction, 1 / sqrt(snr) (Yu et al. 2023, arXiv 2310.08442)."""
    return snr.clamp(MIN_SNR, MAX_SNR).rsqrt()


def debiased_velocity(snr: Tensor) -> Tensor:
    """Debiased estimation for v-prediction, 1 / (snr + 1)."""
    return 1 / (snr.clamp(max=MAX_SNR) + 1)


def _product(factors: list[Weight], snr: Tensor) -> Tensor:
    weight = torch.ones_like(snr)
    for factor in factors:
        weight = weight * factor(snr)
    return weight
