"""Denoising with Stable Diffusion: what every method does with a batch and with a preview prompt."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.conditioning import TextConditioning
from library.data.cache_entry import LATENT_PIXELS
from library.data.dataset import Batch
from library.diffusion.noise import Key
from library.diffusion.objective import DenoisingObjective, Predict
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.samplers import generate_latents
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError
from library.models.latents import decode_latents, encode_images, sample_posterior
from library.models.stable_diffusion import StableDiffusion
from library.randomness import torch_generator
from library.runtime import Runtime
from library.training.prompt_files import PreviewPrompt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingTask:
    """Text and images in, losses or previews out.

    Attributes:
        model: The four parts; U-Net and text encoder on the device, the VAE only while it is used.
        text: How captions and prompts are encoded.
        objective: The loss.
        runtime: Device, precision and seed.
        zero_terminal_snr: Previews follow the rescaled schedule.
        vae_batch_size: Images that the VAE encodes at once.
    """

    model: StableDiffusion
    text: TextConditioning
    objective: DenoisingObjective
    runtime: Runtime
    zero_terminal_snr: bool
    vae_batch_size: int

    @classmethod
    def of(
        cls,
        model: StableDiffusion,
        text: TextConditioning,
        runtime: Runtime,
        *,
        noise: NoiseOptions,
        loss: LossOptions,
        vae_batch_size: int,
    ) -> "DenoisingTask":
        """The task that the options of a script describe."""
        return cls(
            model=model,
            text=text,
            objective=DenoisingObjective(
                NoiseSchedule.stable_diffusion(zero_terminal_snr=noise.zero_terminal_snr),
                model.variant.prediction,
                noise=noise,
                loss=loss,
            ),
            runtime=runtime,
            zero_terminal_snr=noise.zero_terminal_snr,
            vae_batch_size=vae_batch_size,
        )

    def __post_init__(self) -> None:
        """Refuse a U-Net that wants more than noisy latents, which only loading it can tell of some files."""
        channels, latent_channels = self.model.unet.config.in_channels, self.model.variant.latent_channels
        if channels != latent_channels:
            raise UserError(
                f"the U-Net has {channels} input channels (an inpainting or instruction model), and training feeds "
                f"{latent_channels}",
                where=f"--pretrained_model_name_or_path {self.model.source}",
                remedy="Train on the ordinary model that it was made from.",
            )

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, (B, 4, H/8, W/8) each, for pixels (B, 3, H, W)."""
        vae = self.model.vae
        # The VAE's own dtype holds: under autocast --no_half_vae would be undone.
        with torch.autocast(self.runtime.device.type, enabled=False):
            mean, std = encode_images(vae, pixels.to(self.runtime.device))
        return mean.float(), std.float()

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents of ``batch``, (B, 4, h, w): each a sample of its posterior by the example's own key."""
        return self._latents(batch, self._keys(batch))

    def _latents(self, batch: Batch, keys: Sequence[Key]) -> Tensor:
        if batch.latent_mean is not None and batch.latent_std is not None:
            mean, std = batch.latent_mean, batch.latent_std
        else:
            assert batch.pixels is not None, "a batch has pixels or latents"
            parts = [self.posterior(pixels) for pixels in torch.split(batch.pixels, self.vae_batch_size)]
            mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
        noise = [
            torch.randn(mean.shape[1:], generator=torch_generator(seed, "posterior", epoch, example))
            for seed, epoch, example in keys
        ]
        return sample_posterior(mean, std, torch.stack(noise).to(mean)) * self.model.variant.latent_scale

    def losses(self, batch: Batch, context: Tensor) -> Tensor:
        """One weighted loss an example, (B,), for the captions encoded by :attr:`text`."""
        losses = self.objective(self._predictor(context), self.latents(batch), keys=self._keys(batch), mask=batch.mask)
        return losses * batch.loss_weight

    @torch.no_grad()
    def losses_at(self, batch: Batch, timesteps: Sequence[int], *, images: Sequence[tuple[int, int]]) -> Tensor:
        """The plain loss of each example at fixed timesteps; see :meth:`DenoisingObjective.at_timestep`.

        Args:
            batch: The examples, on the device.
            timesteps: T timesteps.
            images: Seed and number of each example's image, which its latents and noise are keyed by.

        Returns:
            (T, B) float32.
        """
        with self.runtime.accelerator.autocast():
            predict = self._predictor(self.text.encode(batch))
            latents = self._latents(batch, [(seed, 0, image) for seed, image in images])
            losses = [
                self.objective.at_timestep(
                    predict,
                    latents,
                    timestep,
                    keys=[(seed, timestep, image) for seed, image in images],
                    mask=batch.mask,
                )
                for timestep in timesteps
            ]
        return torch.stack(losses)

    def _predictor(self, context: Tensor) -> Predict:
        """The U-Net that reads ``context``."""

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            prediction: Tensor = self.model.unet(noisy, timesteps, context, return_dict=False)[0]
            return prediction

        return predict

    def _keys(self, batch: Batch) -> list[tuple[int, int, int]]:
        return [(self.runtime.seed, batch.epoch, example) for example in batch.examples]

    @torch.no_grad()
    def generate(self, prompt: PreviewPrompt) -> "Image":
        """The image of ``prompt``, which has a seed; the caller puts modules with dropout into evaluation mode."""
        assert prompt.seed is not None, "a preview is keyed"
        model = self.model

        def predict(noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            # Of all weights the biases are never kept in 8 bits.
            dtype = model.unet.conv_in.bias.dtype
            prediction: Tensor = model.unet(noisy.to(dtype), timesteps, context, return_dict=False)[0]
            return prediction

        with self.runtime.accelerator.autocast():
            context, uncond = self.text.encode_prompts(prompt.prompt, prompt.negative_prompt)
            latents = generate_latents(
                predict,
                context,
                uncond,
                prediction=model.variant.prediction,
                zero_terminal_snr=self.zero_terminal_snr,
                sampler=prompt.sampler,
                steps=prompt.steps,
                guidance=prompt.scale,
                shape=(
                    model.variant.latent_channels,
                    prompt.height // LATENT_PIXELS,
                    prompt.width // LATENT_PIXELS,
                ),
                generator=torch.Generator().manual_seed(prompt.seed),
            )
        with self.vae_in_use(), torch.autocast(self.runtime.device.type, enabled=False):
            pixels = decode_latents(model.vae, latents, scale=model.variant.latent_scale)
        return _to_image(pixels[0])

    @contextmanager
    def encoding(self) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """:meth:`posterior` with the VAE on the device from the first image on, and back where it was afterwards."""
        with ExitStack() as in_use:
            start = cache(lambda: in_use.enter_context(self.vae_in_use()))

            def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
                start()
                return self.posterior(pixels)

            yield encode

    @contextmanager
    def vae_in_use(self) -> Iterator[None]:
        """The VAE on the device inside the block, and back where it was afterwards."""
        vae = self.model.vae
        home = vae.device
        vae.to(self.runtime.device)
        try:
            yield
        finally:
            vae.to(home)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` and all it holds into evaluation mode inside the block."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _to_image(pixels: Tensor) -> "Image":
    """An image from pixels (3, H, W) in [-1, 1]."""
    from PIL import Image

    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())
