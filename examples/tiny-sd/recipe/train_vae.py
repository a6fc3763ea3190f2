"""Train the VAE of the tiny Stable Diffusion model: 128x128 pictures to 16x16x4 latents and back.

Six minutes on one processor core. The loss is the absolute error, of pixels and of their differences (which keeps edges
sharp), the squared error, and a little Kullback-Leibler divergence. Afterwards every latent channel is shifted and
scaled, exactly and on both sides, so that latents times 0.18215 have mean 0 and deviation 1 on the world of shapes.
"""

import argparse
import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from shapes_world import Pixels, Size, classify, clutter, random_scene, render
from starting_weights import calm_vae
from torch import Tensor, nn

LATENT_SCALE: Final = 0.18215
EDGE_WEIGHT: Final = 0.5
DIVERGENCE_WEIGHT: Final = 3e-4
WARMUP_STEPS: Final = 30
REPORT_EVERY: Final = 25
# Most steps see many small pictures; the last ones see whole ones, which attention in the middle needs.
SMALL, SMALL_BATCH, SMALL_SCENES = (64, 64), 16, 9
WHOLE, WHOLE_BATCH, WHOLE_SCENES = (128, 128), 5, 3
WHOLE_FROM: Final = 0.85  # of the steps


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are the settings of the published VAE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 32, 64], help="channels of each level")
    parser.add_argument("--layers", type=int, default=1, help="layers a block")
    parser.add_argument("--norm_groups", type=int, default=2, help="norm groups; many lose the colours")
    parser.add_argument("--steps", type=int, default=525)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    return parser.parse_args()


def build_vae(options: argparse.Namespace) -> nn.Module:
    """A VAE of Stable Diffusion's block types, calmed."""
    torch.manual_seed(options.seed)
    levels = len(options.channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(options.channels),
        layers_per_block=options.layers,
        norm_num_groups=options.norm_groups,
        sample_size=128,
        scaling_factor=LATENT_SCALE,
    )
    calm_vae(vae)
    return vae.to(memory_format=torch.channels_last)


def scene_picture(size: Size, rng: np.random.Generator) -> Pixels:
    """One picture of the world."""
    return render(random_scene(rng), size, rng)


def to_tensor(pictures: list[Pixels]) -> Tensor:
    """Pictures (0..255) as a batch (pictures, 3, height, width), -1..1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def draw_batch(step: int, options: argparse.Namespace) -> Tensor:
    """The pictures of a step: pieces of scenes and clutter, later whole ones; half of the batches mirrored."""
    rng = np.random.default_rng((options.seed, step))
    if step < options.steps * WHOLE_FROM:
        pictures = []
        for _ in range(SMALL_SCENES):
            top, left = rng.integers(0, WHOLE[1] - SMALL[1] + 1), rng.integers(0, WHOLE[0] - SMALL[0] + 1)
            pictures.append(scene_picture(WHOLE, rng)[top : top + SMALL[1], left : left + SMALL[0]])
        pictures += [clutter(SMALL, rng) for _ in range(SMALL_BATCH - SMALL_SCENES)]
    else:
        pictures = [scene_picture(WHOLE, rng) for _ in range(WHOLE_SCENES)]
        pictures += [clutter(WHOLE, rng) for _ in range(WHOLE_BATCH - WHOLE_SCENES)]
    batch = to_tensor(pictures)
    return batch.flip(3) if rng.random() < 0.5 else batch


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, downwards and to the right."""
    return pictures[..., 1:, :] - pictures[..., :-1, :], pictures[..., :, 1:] - pictures[..., :, :-1]


def train(vae: nn.Module, options: argparse.Namespace) -> None:
    """Run all steps."""
    optimizer = torch.optim.AdamW(vae.parameters(), options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    recent: list[tuple[float, float]] = []
    for step in range(options.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        rate = options.learning_rate * min(1, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures = draw_batch(step, options)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        absolute, squared = (decoded - pictures).abs().mean(), (decoded - pictures).square().mean()
        sharpness = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(pictures), strict=True))
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = absolute + EDGE_WEIGHT * sharpness + squared + DIVERGENCE_WEIGHT * divergence

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent.append((absolute.item(), psnr(squared.item())))
        if (step + 1) % REPORT_EVERY == 0:
            error, quality = np.mean(recent, axis=0)
            print(f"step {step + 1}/{options.steps}  error {error:.4f}  {quality:.1f} dB", flush=True)
            recent.clear()


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB, for values from -1 to 1."""
    return 10 * math.log10(4 / squared_error)


@torch.no_grad()
def normalise_latents(vae: nn.Module, pictures: list[Pixels]) -> None:
    """Give every latent channel mean 0 and deviation 1 / LATENT_SCALE; the decoded pictures stay the same."""
    means = torch.cat([vae.encode(to_tensor([picture])).latent_dist.mean for picture in pictures])
    centre = means.mean((0, 2, 3))  # (4,)
    factor = 1 / (LATENT_SCALE * means.std((0, 2, 3)))  # (4,)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    channels = len(centre)
    into.weight[:channels] *= factor[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - centre) * factor
    into.bias[channels:] += 2 * factor.log()
    out_of.bias += out_of.weight[:, :, 0, 0] @ centre
    out_of.weight /= factor[None, :, None, None]


@torch.no_grad()
def measure(vae: nn.Module, pictures: list[Pixels]) -> tuple[float, float, float]:
    """Mean quality in dB, share of pictures recognised alike before and after, deviation of the scaled latents."""
    qualities, alike, latents = [], [], []
    for picture in pictures:
        batch = to_tensor([picture])
        mean = vae.encode(batch).latent_dist.mean
        decoded = vae.decode(mean).sample.clamp(-1, 1)
        qualities.append(psnr((decoded - batch).square().mean().item()))
        seen = classify(((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy())
        original = classify(picture)
        alike.append(seen is not None and original is not None and seen.scene == original.scene)
        latents.append(mean * LATENT_SCALE)
    return float(np.mean(qualities)), float(np.mean(alike)), torch.cat(latents).std().item()


def main() -> None:
    """Build, train, normalise, measure, write."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    vae = build_vae(options)
    train(vae, options)
    vae.eval()
    rng = np.random.default_rng((options.seed, options.steps))
    normalise_latents(vae, [scene_picture(WHOLE, rng) for _ in range(300)])
    quality, alike, deviation = measure(vae, [scene_picture(WHOLE, rng) for _ in range(64)])
    print(f"world {quality:.1f} dB  recognised alike {alike:.2f}  deviation of scaled latents {deviation:.2f}")
    vae.to(torch.float16).save_pretrained(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
