"""Train the U-Net and the text encoder of the tiny Stable Diffusion model on the world of shapes.

It needs one processor core and no data. It can be stopped at any time: the same command continues from the checkpoint
in the work folder and draws what the uninterrupted run would have drawn.

Objective: noise prediction (Ho et al. 2020, arXiv:2006.11239) weighted by min(SNR, 5) / SNR (Hang et al. 2023,
arXiv:2303.09556), with 10 % empty captions for classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from shapes_world import Scene, Size, describe, random_scene, render
from starting_weights import calm_unet, grow_unet
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TINY_SD: Final = Path(__file__).resolve().parent.parent
TEXT_WIDTH: Final = 64
LATENT_SCALE: Final = 0.18215
MIN_SNR_GAMMA: Final = 5.0
EMPTY_CAPTIONS: Final = 0.1
WARMUP_STEPS: Final = 60
LAST_RATE: Final = 0.01  # of the highest learning rate
TEXT_RATE: Final = 0.7  # of the U-Net's learning rate
EMA_EVERY: Final = 5
EMA_DECAY: Final = 0.98
REPORT_EVERY: Final = 50
# Share of the pictures, and of the batches, that have each size (width, height).
SIZES: Final[dict[Size, float]] = {(128, 128): 0.85, (160, 96): 0.05, (96, 160): 0.05, (96, 96): 0.05}


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are the settings of the published model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=TINY_SD / "vae", help="folder of the trained VAE")
    parser.add_argument("--tokenizer", type=Path, default=TINY_SD / "tokenizer", help="folder of the CLIP vocabulary")
    parser.add_argument("--init_from", type=Path, help="diffusers folder of a trained, possibly shallower model")
    parser.add_argument("--work", type=Path, required=True, help="folder for encoded pictures and the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 96, 96], help="channels of each level")
    parser.add_argument("--layers", type=int, default=2, help="layers a block")
    parser.add_argument("--heads", type=int, default=8, help="attention heads")
    parser.add_argument("--norm_groups", type=int, default=8, help="norm groups; one channel a group loses the colours")
    parser.add_argument("--pictures", type=int, default=10000, help="pictures to draw and encode")
    parser.add_argument("--steps", type=int, default=8400, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures a step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="highest learning rate of the U-Net")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--checkpoint_minutes", type=float, default=5)
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures of one size: latents (pictures, 4, height / 8, width / 8), about unit deviation, and what they show."""

    latents: Tensor
    scenes: list[Scene]


def draw_scenes(pictures: int, seed: int) -> dict[Size, list[Scene]]:
    """What is drawn, by size."""
    rng = np.random.default_rng((seed, 1))
    return {size: [random_scene(rng) for _ in range(round(pictures * share))] for size, share in SIZES.items()}


@torch.no_grad()
def encode_scenes(vae: nn.Module, scenes: list[Scene], size: Size, seed: int, *, at_once: int = 20) -> Tensor:
    """Latents of ``scenes``: (scenes, 4, height / 8, width / 8)."""
    rng = np.random.default_rng((seed, 2, *size))
    parts = []
    for start in range(0, len(scenes), at_once):
        pixels = np.stack([render(scene, size, rng) for scene in scenes[start : start + at_once]])
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(vae.encode(scaled).latent_dist.mean * LATENT_SCALE)
    return torch.cat(parts)


def load_world(options: argparse.Namespace) -> list[Group]:
    """Draw and encode the world, or take it from the work folder when that was done before."""
    scenes = draw_scenes(options.pictures, options.seed)
    kept = options.work / f"latents-{options.pictures}-{options.seed}.pt"
    if kept.is_file():
        latents = torch.load(kept, weights_only=True)
    else:
        print(f"drawing and encoding {options.pictures} pictures", flush=True)
        vae = AutoencoderKL.from_pretrained(options.vae, torch_dtype=torch.float32).eval()
        latents = [encode_scenes(vae, scenes[size], size, options.seed) for size in SIZES]
        save_whole(latents, kept)
    return [Group(tensor, scenes[size]) for tensor, size in zip(latents, SIZES, strict=True)]


def build_text_encoder() -> nn.Module:
    """A CLIP text encoder of two layers over the whole vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH * 4,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )


def build_unet(options: argparse.Namespace) -> nn.Module:
    """A U-Net of Stable Diffusion's block types: attention to the text on every level but the last."""
    levels = len(options.channels)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(options.channels),
        layers_per_block=options.layers,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=options.heads,
        norm_num_groups=options.norm_groups,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )


def build_model(options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """U-Net and text encoder, fresh or grown from ``--init_from``."""
    torch.manual_seed(options.seed)
    unet, text_encoder = build_unet(options), build_text_encoder()
    calm_unet(unet)
    if options.init_from:
        trained = StableDiffusionPipeline.from_pretrained(options.init_from, torch_dtype=torch.float32)
        text_encoder.load_state_dict(trained.text_encoder.state_dict())
        copied = grow_unet(unet, trained.unet)
        print(f"{len(copied)} of {len(list(unet.parameters()))} tensors taken from the trained U-Net", flush=True)
    return unet, text_encoder


class Trainer:
    """Everything that changes with a step, and the step itself.

    Args:
        unet: Predicts the noise.
        text_encoder: Encodes the captions.
        tokenize: Caption to 77 token ids.
        world: What there is to learn.
        options: The command line.
    """

    def __init__(
        self, unet: nn.Module, text_encoder: nn.Module, tokenize: Any, world: list[Group], options: argparse.Namespace
    ) -> None:
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenize = tokenize
        self.world = world
        self.options = options
        self.step = 0
        self.parameters = [*unet.parameters(), *text_encoder.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        tables = [p for name, p in text_encoder.named_parameters() if "embedding" in name]
        layers = [p for name, p in text_encoder.named_parameters() if "embedding" not in name]
        # The norm of the whole vocabulary's gradient would drown that of the layers.
        self.clipped = [*unet.parameters(), *layers]
        groups = [
            {"params": list(unet.parameters()), "scale": 1.0, "weight_decay": 1e-3},
            {"params": layers, "scale": TEXT_RATE, "weight_decay": 1e-3},
            {"params": tables, "scale": TEXT_RATE, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).float()  # (1000,)

    def rate(self) -> float:
        """Learning rate of this step: a short rise, then half a cosine."""
        progress = min(1.0, self.step / self.options.steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        rise = min(1.0, (self.step + 1) / WARMUP_STEPS)
        return self.options.learning_rate * rise * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents (batch, 4, h, w) and token ids (batch, 77) of this step."""
        rng = np.random.default_rng((self.options.seed, 3, self.step))
        group = self.world[rng.choice(len(self.world), p=list(SIZES.values()))]
        chosen = rng.integers(0, len(group.scenes), self.options.batch_size)
        captions = ["" if rng.random() < EMPTY_CAPTIONS else describe(group.scenes[i], rng) for i in chosen]
        return group.latents[chosen], torch.stack([self.tokenize(caption) for caption in captions])

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; the weighted loss and the plain mean squared error."""
        latents, token_ids = self.batch()
        size = len(latents)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        # One timestep out of each of `size` equal ranges: less noise in the loss than independent draws.
        share = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (share * len(self.alphas_cumprod)).long()
        noise = torch.randn(latents.shape, generator=generator)
        kept = self.alphas_cumprod[timesteps]
        noisy = latents * kept.sqrt()[:, None, None, None] + noise * (1 - kept).sqrt()[:, None, None, None]
        predicted = self.unet(noisy, timesteps, self.text_encoder(token_ids).last_hidden_state).sample
        errors = (predicted - noise).square().mean((1, 2, 3))
        snr = kept / (1 - kept)
        loss = (errors * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean()

        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.clipped, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group["scale"]
        self.optimizer.step()
        if self.step % EMA_EVERY == 0:
            decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.step += 1
        return loss.item(), errors.mean().item()

    def save(self, path: Path) -> None:
        """Write a checkpoint that :meth:`load` continues from exactly."""
        state = {"step": self.step, "average": self.average, "optimizer": self.optimizer.state_dict()}
        save_whole(state | {"parameters": [p.detach() for p in self.parameters]}, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])


def save_whole(content: object, path: Path) -> None:
    """Write a torch file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    torch.save(content, temporary)
    os.replace(temporary, path)


def train(trainer: Trainer, checkpoint: Path, options: argparse.Namespace) -> None:
    """Run to the last step, saving every few minutes, when stopped and at the end."""
    begun, first, saved = time.monotonic(), trainer.step, time.monotonic()
    recent: list[tuple[float, float]] = []
    try:
        while trainer.step < options.steps:
            recent.append(trainer.train_step())
            if trainer.step % REPORT_EVERY == 0 or trainer.step == options.steps:
                speed = (time.monotonic() - begun) / (trainer.step - first)
                loss, error = np.mean(recent, axis=0)
                left = (options.steps - trainer.step) * speed / 60
                print(
                    f"step {trainer.step}/{options.steps}  loss {loss:.4f}  error {error:.4f}"
                    f"  rate {trainer.rate():.2e}  {speed:.2f} s/step  {left:.0f} min left",
                    flush=True,
                )
                recent.clear()
            if time.monotonic() - saved > options.checkpoint_minutes * 60:
                trainer.save(checkpoint)
                saved = time.monotonic()
    finally:
        trainer.save(checkpoint)


def write_pipeline(trainer: Trainer, tokenizer: Any, options: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers folder in half precision."""
    with torch.no_grad():
        torch._foreach_copy_(trainer.parameters, trainer.average)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(options.vae),
        text_encoder=trainer.text_encoder,
        tokenizer=tokenizer,
        unet=trainer.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(options.output, safe_serialization=True)
    shutil.rmtree(options.output / "tokenizer")
    shutil.copytree(options.tokenizer, options.output / "tokenizer")
    # Programs with an older transformers know the text encoder's tensors only by these names.
    named = {f"text_model.{name}": tensor for name, tensor in trainer.text_encoder.state_dict().items()}
    save_file(named, str(options.output / "text_encoder" / "model.safetensors"), metadata={"format": "pt"})
    for path in options.output.glob("*/config.json"):
        # Where the parts came from is nobody else's business.
        config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Draw the world, build the model, train it, write it."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer, model_max_length=77)

    @cache
    def tokenize(caption: str) -> Tensor:
        return torch.tensor(tokenizer(caption, padding="max_length", max_length=77, truncation=True).input_ids)

    world = load_world(options)
    unet, text_encoder = build_model(options)
    trainer = Trainer(unet, text_encoder, tokenize, world, options)
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.is_file():
        trainer.load(checkpoint)
        print(f"continuing after step {trainer.step}", flush=True)
    train(trainer, checkpoint, options)
    write_pipeline(trainer, tokenizer, options)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
