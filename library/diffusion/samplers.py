"""Samplers: from noise to a latent image, stepping with diffusers' schedulers. Imports nothing heavy by itself."""

import difflib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.diffusion.schedule import Prediction

MAX_STEPS: Final = 999
"""With as many steps as timesteps, some solvers would visit a timestep twice and divide by the distance."""

# Stable Diffusion's own way with these two: timesteps 1, 1 + n, 1 + 2n, ..., and the last step ends on the first alpha
# of the schedule.
_LEADING: Final = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}

# Sampler -> diffusers class and what it is given beside the schedule. Predicted latents are never clipped: unlike
# pixels, they are not bound to [-1, 1].
_SCHEDULERS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {"clip_sample": False, **_LEADING}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True, **_LEADING}),
        "lms": ("LMSDiscreteScheduler", {}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm_2": ("KDPM2DiscreteScheduler", {}),
        "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
        # The first DPM-Solver has no step to a noise level of zero.
        "dpmsolver": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        ),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "dpmsingle": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    }
)
_ALIASES: Final = MappingProxyType({f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")})

SAMPLERS: Final = (*_SCHEDULERS, *_ALIASES)
"""The names a sampler may be given by; ``k_x`` is the same as ``x``."""


def check_sampler(name: str, *, where: str | None = None) -> None:
    """Refuse a sampler that does not exist or cannot run here.

    Raises:
        UserError: If it does.
    """
    if name not in SAMPLERS:
        nearest = difflib.get_close_matches(name.lower(), SAMPLERS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(f"there is no sampler {name!r}", where=where, remedy=f"{hint}known: {', '.join(SAMPLERS)}")
    if _ALIASES.get(name, name) == "lms" and importlib.util.find_spec("scipy") is None:
        raise UserError(
            f"the sampler {name!r} needs the package scipy",
            where=where,
            remedy="pip install scipy, or choose another sampler, such as euler",
        )


def build_scheduler(name: str, *, prediction: "Prediction", zero_terminal_snr: bool = False) -> Any:
    """The diffusers scheduler behind a sampler, for Stable Diffusion's noise schedule.

    Args:
        name: One of :data:`SAMPLERS`.
        prediction: What the model predicts.
        zero_terminal_snr: Whether the model was trained on the rescaled schedule.

    Raises:
        UserError: As :func:`check_sampler`.
    """
    import diffusers

    from library.diffusion.schedule import BETA_END, BETA_START, TRAIN_TIMESTEPS

    check_sampler(name)
    kind, config = _SCHEDULERS[_ALIASES.get(name, name)]
    config = {"num_train_timesteps": TRAIN_TIMESTEPS, "prediction_type": prediction, **config}
    if zero_terminal_snr:
        config["trained_betas"] = _rescaled_betas()
        if "timestep_spacing" in config:
            # Only so is the last timestep visited, the one that rescaling is about.
            config |= {"timestep_spacing": "trailing", "steps_offset": 0}
    else:
        config |= {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}
    with warnings.catch_warnings():
        # The first DPM-Solver is to go from diffusers 1.0: our business, not the user's.
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(diffusers, kind)(**config)


def generate_latents(
    predict: "Callable[[Tensor, Tensor, Tensor], Tensor]",
    context: "Tensor",
    uncond: "Tensor | None",
    *,
    prediction: "Prediction",
    zero_terminal_snr: bool = False,
    sampler: str,
    steps: int,
    guidance: float,
    shape: tuple[int, int, int],
    generator: "torch.Generator",
) -> "Tensor":
    """Draw noise and remove it step by step, with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    Args:
        predict: The model: noisy latents (N, C, h, w) float32, timesteps (N,) and context (N, L, D) to a prediction
            (N, C, h, w). It is called without gradients.
        context: The encoded prompts, (B, L, D); their device is where everything happens.
        uncond: The encoded negative prompts, (B, L, D), or None for no guidance.
        prediction: What the model predicts.
        zero_terminal_snr: Whether the model was trained on the rescaled schedule.
        sampler: One of :data:`SAMPLERS`.
        steps: How many steps to take; more than 999 are taken as 999.
        guidance: How far to go from the negative prompt towards the prompt; at 1 or below there is no guidance.
        shape: Channels, height and width of the latents of one image.
        generator: Where all noise comes from: the first, and what ancestral samplers add.

    Returns:
        (B, C, h, w) float32, scaled as the U-Net has them.

    Raises:
        UserError: As :func:`check_sampler`.
    """
    import torch

    scheduler = build_scheduler(sampler, prediction=prediction, zero_terminal_snr=zero_terminal_snr)
    scheduler.set_timesteps(min(steps, MAX_STEPS), device=context.device)
    noise = torch.randn(len(context), *shape, generator=generator, device=generator.device)
    latents: Tensor = noise.to(context.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    denoise = predict if uncond is None or guidance <= 1 else _guided(predict, uncond, guidance)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            found = denoise(scaled, timestep.expand(len(latents)), context).float()
            latents = scheduler.step(found, timestep, latents, **extra, return_dict=False)[0]
    return latents


def _guided(
    predict: "Callable[[Tensor, Tensor, Tensor], Tensor]", uncond: "Tensor", guidance: float
) -> "Callable[[Tensor, Tensor, Tensor], Tensor]":
    """``predict`` with classifier-free guidance; both halves go through the model together."""
    import torch

    def guided(latents: "Tensor", timesteps: "Tensor", context: "Tensor") -> "Tensor":
        both = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2), torch.cat([uncond, context]))
        without, towards = both.float().chunk(2)
        return without + guidance * (towards - without)

    return guided


def _rescaled_betas() -> list[float]:
    """Betas of the zero-terminal schedule, stopped just short of zero: samplers divide by what is left of the image."""
    import torch

    from library.diffusion.schedule import NoiseSchedule

    kept = NoiseSchedule.stable_diffusion(zero_terminal_snr=True).alphas_cumprod.double()
    # The smallest number above zero in half precision, the bound that diffusers takes as well.
    kept[-1] = 2.0**-24
    betas: list[float] = (1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).tolist()
    return betas
