"""The first batch of a run, computed with diffusers' and transformers' own classes and the documented random keys."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SEED = 7
"""The seed of :func:`tests.scripts.runs.run_script`."""


@dataclass(frozen=True)
class Example:
    """An example of the batch.

    Attributes:
        number: Its position among the sorted images.
        alpha: Share of the signal, the cumulative alpha of its timestep.
        errors: Squared error of each value of the prediction, (4, 8, 8).
    """

    number: int
    alpha: float
    errors: torch.Tensor

    @property
    def loss(self) -> float:
        return self.errors.mean().item()


def first_batch(
    model: Path,
    images: Path,
    *,
    caption_of: Callable[[int], str] = lambda number: f"a thing, number {number}",
    count: int = 8,
    batch_size: int = 2,
    velocity: bool = False,
    padded: bool = True,
) -> list[Example]:
    """The examples of the first batch, with the untrained diffusers model in the folder ``model``."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    from library.data.epoch_plan import EpochPlan, PlanBucket
    from library.randomness import torch_generator

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    padding = {"padding": "max_length", "max_length": 77} if padded else {}
    plan = EpochPlan([PlanBucket(tuple(range(count)), batch_size)], SEED, 1, 1)
    found = []
    with torch.no_grad():
        for number in plan.epoch(1)[0].micro_batches[0].examples:

            def draw(purpose: str, number: int = number) -> torch.Tensor:
                return torch.randn(4, 8, 8, generator=torch_generator(SEED, purpose, 1, number))[None]

            image = Image.open(images / f"{number:02d}.png").convert("RGB")
            pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
            posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
            latents = (posterior.mean + posterior.std * draw("posterior")) * 0.18215
            timestep = torch.randint(0, 1000, (), generator=torch_generator(SEED, "timestep", 1, number))[None]
            noise = draw("noise")
            ids = tokenizer(caption_of(number), return_tensors="pt", **padding).input_ids
            context = text_encoder(ids).last_hidden_state
            prediction = unet(schedule.add_noise(latents, noise, timestep), timestep, context).sample
            target = schedule.get_velocity(latents, noise, timestep) if velocity else noise
            alpha = schedule.alphas_cumprod[timestep].item()
            found.append(Example(number, alpha, ((prediction - target) ** 2)[0]))
    return found
