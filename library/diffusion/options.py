"""Options of the noise that is added and of the loss. Imports nothing heavy."""

import math
from dataclasses import dataclass
from typing import Final

from library.errors import Problem
from library.options import option

# What a setting belongs to, and what that has to be.
_STRENGTH_OF: Final = {
    "noise_offset_random_strength": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
}
_DISTRIBUTION_OF: Final = {
    "timestep_logit_mean": "logit_normal",
    "timestep_logit_std": "logit_normal",
    "timestep_snr_gamma": "snr",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseOptions:
    """Noise and timesteps."""

    noise_offset: float | None = option(
        None,
        help="Add this much constant noise per image and channel, so that very dark and very bright images can be "
        "learnt (about 0.05 to 0.1). 0 is off.",
    )
    noise_offset_random_strength: bool = option(
        False, help="Draw the strength of the noise offset between 0 and --noise_offset."
    )
    multires_noise_iterations: int | None = option(
        None, minimum=0, help="Levels of multi-resolution (pyramid) noise, 6 to 10 as a rule. 0 is off."
    )
    multires_noise_discount: float = option(
        0.3, minimum=0, help="Each level of multi-resolution noise weighs this much of the level before it."
    )
    ip_noise_gamma: float | None = option(
        None,
        minimum=0,
        help="Input perturbation: extra noise of this strength on the noised latents, not on the target "
        "(about 0.1). 0 is off.",
    )
    ip_noise_gamma_random_strength: bool = option(
        False, help="Draw the strength of the input perturbation between 0 and --ip_noise_gamma."
    )
    adaptive_noise_scale: float | None = option(
        None,
        help="Add this factor times the mean of each latent channel (absolute) to the noise offset; "
        "needs --noise_offset.",
    )
    zero_terminal_snr: bool = option(
        False, help="Rescale the noise schedule so that the last timestep is pure noise; meant for v-prediction."
    )
    min_timestep: int | None = option(
        None, minimum=0, maximum=999, help="Lowest timestep that is trained, 0 when absent."
    )
    max_timestep: int | None = option(
        None, minimum=1, maximum=1000, help="End (exclusive) of the timesteps that are trained, 1000 when absent."
    )
    timestep_distribution: str = option(
        "uniform",
        choices=("uniform", "logit_normal", "snr"),
        help="How often each timestep is trained: all alike, most often in the middle (logit_normal), or in proportion "
        "to its Min-SNR weight (snr).",
    )
    timestep_logit_mean: float = option(
        0.0, help="With logit_normal: mean of the logit of timestep / 1000; above 0 trains noisier images more often."
    )
    timestep_logit_std: float = option(
        1.0, above=0, help="With logit_normal: standard deviation of that logit; smaller is more concentrated."
    )
    timestep_snr_gamma: float = option(
        5.0,
        above=0,
        help="With snr: gamma of the weight; timesteps with a higher signal-to-noise ratio come less often.",
    )

    def notices(self) -> list[str]:
        """Settings of noise that is not added, and of a distribution that is not drawn from."""
        plain = NoiseOptions()
        needs = {name: f"--{owner}" for name, owner in _STRENGTH_OF.items() if not getattr(self, owner)}
        needs |= {
            name: f"--timestep_distribution {owner}"
            for name, owner in _DISTRIBUTION_OF.items()
            if self.timestep_distribution != owner
        }
        return [
            f"without effect without {need}: --{name}"
            for name, need in needs.items()
            if getattr(self, name) != getattr(plain, name)
        ]

    def problems(self) -> list[Problem]:
        """Relations inside the group."""
        found = []
        if self.adaptive_noise_scale and self.noise_offset is None:
            found.append(
                Problem(
                    "--adaptive_noise_scale changes the noise offset, but there is none",
                    "--adaptive_noise_scale",
                    "Give --noise_offset as well, or leave --adaptive_noise_scale out.",
                )
            )
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        if low >= high:
            found.append(
                Problem(
                    f"no timestep is left between --min_timestep {low} and --max_timestep {high}",
                    "--min_timestep" if self.min_timestep is not None else "--max_timestep",
                    "--min_timestep must be smaller than --max_timestep.",
                )
            )
        elif self.timestep_distribution == "logit_normal" and not self._reaches(low, high):
            found.append(
                Problem(
                    f"a logit_normal distribution with mean {self.timestep_logit_mean} and standard deviation "
                    f"{self.timestep_logit_std} never gives a timestep from {low} to {high - 1}",
                    "--timestep_distribution",
                    "Move --timestep_logit_mean towards them, or give a larger --timestep_logit_std.",
                )
            )
        return found

    def _reaches(self, low: int, high: int) -> bool:
        """Whether a logit-normal distribution has weight in [low, high), in double precision."""
        below = [
            math.erf((_logit(edge / 1000) - self.timestep_logit_mean) / self.timestep_logit_std / math.sqrt(2))
            for edge in (low, high)
        ]
        return below[1] > below[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Loss."""

    loss_type: str = option(
        "l2",
        choices=("l1", "l2", "huber", "smooth_l1"),
        help="Loss per value: squared (l2), absolute (l1), or pseudo-Huber (huber, smooth_l1), which limits the "
        "weight of outliers.",
    )
    huber_schedule: str = option(
        "snr",
        choices=("constant", "exponential", "snr"),
        help="How the threshold of the Huber losses depends on the timestep.",
    )
    huber_c: float = option(0.1, above=0, help="Threshold of the Huber losses.")
    huber_scale: float = option(
        1.0, above=0, help="Factor on the Huber threshold with the schedules constant and exponential."
    )
    min_snr_gamma: float | None = option(
        None,
        minimum=0,
        help="Min-SNR weighting of timesteps with this gamma (5 as a rule); steadies training. 0 is off.",
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, help="Weigh timesteps of a v-prediction model as if noise were predicted; needs --v_parameterization."
    )
    v_pred_like_loss: float | None = option(
        None,
        minimum=0,
        help="Add this much of a loss weighted as for v-prediction to that of a noise-prediction model. 0 is off.",
    )
    debiased_estimation_loss: bool = option(False, help="Debiased estimation weighting of timesteps.")

    def notices(self) -> list[str]:
        """Settings of the threshold of a loss that has none, and a factor on one that takes none."""
        plain = LossOptions()
        names = ("huber_schedule", "huber_c", "huber_scale")
        given = [f"--{name}" for name in names if getattr(self, name) != getattr(plain, name)]
        if given and self.loss_type not in ("huber", "smooth_l1"):
            return [f"without effect with --loss_type {self.loss_type}: {', '.join(given)}"]
        if self.huber_scale != plain.huber_scale and self.huber_schedule == "snr":
            return ["without effect with --huber_schedule snr: --huber_scale"]
        return []


def _logit(share: float) -> float:
    if share in (0.0, 1.0):
        return math.inf if share else -math.inf
    return math.log(share / (1 - share))
