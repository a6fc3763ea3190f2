"""How often each timestep is trained: distributions other than the uniform one, as tables of probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from library.diffusion.noise import Key, sample_timesteps
from library.diffusion.options import NoiseOptions
from library.diffusion.schedule import TRAIN_TIMESTEPS, NoiseSchedule, Prediction
from library.diffusion.weighting import min_snr_noise, min_snr_velocity
from library.randomness import torch_generator

SampleTimesteps = Callable[[Sequence[Key]], Tensor]
"""Keys of examples to a timestep each, (B,) int64 on the CPU."""


def timestep_sampler(options: NoiseOptions, schedule: NoiseSchedule, prediction: Prediction) -> SampleTimesteps:
    """Draws timesteps as ``options`` ask, each by its example's key, from [min_timestep, max_timestep)."""
    if options.timestep_distribution == "uniform":
        return partial(sample_timesteps, options=options)
    if options.timestep_distribution == "logit_normal":
        shares = logit_normal_shares(options.timestep_logit_mean, options.timestep_logit_std)
    else:
        shares = snr_shares(schedule, prediction, options.timestep_snr_gamma)
    low = options.min_timestep or 0
    high = TRAIN_TIMESTEPS if options.max_timestep is None else options.max_timestep
    return _TableSampler(cumulated=shares[low:high].cumsum(0), low=low)


def logit_normal_shares(mean: float, deviation: float) -> Tensor:
    """Shares (1000,) float64 of timesteps whose position u has a normal logit: log(u / (1 - u)) ~ N(mean, deviation^2).

    Esser et al. 2024, arXiv 2403.03206, section 3.1. Timestep t is the interval [t / 1000, (t + 1) / 1000) of u in
    [0, 1]; u near 1 is nearly all noise, so a larger mean trains noisier images.
    """
    edges = torch.linspace(0, 1, TRAIN_TIMESTEPS + 1, dtype=torch.float64)
    below: Tensor = torch.special.ndtr((torch.logit(edges) - mean) / deviation)
    return below.diff()


def snr_shares(schedule: NoiseSchedule, prediction: Prediction, gamma: float) -> Tensor:
    """Shares (1000,) float64 in proportion to the Min-SNR weight of each timestep (Hang et al. 2023, arXiv 2303.09556).

    min(snr, gamma) / snr for noise prediction, min(snr, gamma) / (snr + 1) for v-prediction. So the loss is on average,
    up to a factor, what uniform timesteps with that weight give, but no draw is spent on a timestep that hardly counts.
    """
    weight = min_snr_velocity if prediction == "v_prediction" else min_snr_noise
    weights = weight(schedule.snr(torch.arange(TRAIN_TIMESTEPS)).double(), gamma)
    return weights / weights.sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class _TableSampler:
    """Draws by the inverse of a cumulated table.

    Attributes:
        cumulated: Cumulated shares of the timesteps from ``low`` on, (N,) float64; they need not end at 1.
        low: The first timestep.
    """

    cumulated: Tensor
    low: int

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """A timestep for each key."""
        draws = torch.stack([self._uniform(key) for key in keys]) * self.cumulated[-1]
        found = torch.searchsorted(self.cumulated, draws, right=True)
        # A product that is rounded up to the whole would lie behind the table.
        return found.clamp(max=len(self.cumulated) - 1) + self.low

    @staticmethod
    def _uniform(key: Key) -> Tensor:
        seed, epoch, example = key
        return torch.rand((), dtype=torch.float64, generator=torch_generator(seed, "timestep", epoch, example))
