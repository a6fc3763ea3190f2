"""The first loss of a run with every option of noise and loss equals a few lines of arithmetic written out here.

Model and schedule are diffusers' own classes; of this program only the documented random keys are used. The formulas
are those of the papers, on the schedule that is trained with.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tests.scripts.runs import run_script, write_images
from tests.tiny import tiny_sd

SEED = 7
FLAGS = {"sd1": [], "sd2_v": ["--v2", "--v_parameterization"]}
WITH_16_BLOCKS = "-16"
PRIOR = 1
"""Number of the only regularisation image; 0 is the only training image."""


@dataclass(frozen=True)
class Parts:
    """What a reference needs of a model: its folder, and the U-Net of diffusers."""

    folder: Path
    encode: Callable[[str, str], tuple[Tensor, Tensor, Tensor]]
    unet: torch.nn.Module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """Small ones, and, for the script that needs SD's 16 blocks with cross-attention, those with as many."""
    folder = tmp_path_factory.mktemp("models")
    return {
        f"{kind}{suffix}": _parts(tiny_sd(folder / f"{kind}{suffix}", kind, layers_per_block=layers))
        for kind in FLAGS
        for suffix, layers in (("", 1), (WITH_16_BLOCKS, 2))
    }


def _parts(folder: Path) -> Parts:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    @cache
    @torch.no_grad()
    def encode(image: str, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        pixels = torch.from_numpy(np.asarray(Image.open(image).convert("RGB"), dtype=np.float32) / 127.5 - 1)
        posterior = vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist
        ids = tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return posterior.mean, posterior.std, text_encoder(ids).last_hidden_state

    return Parts(folder, encode, UNet2DConditionModel.from_pretrained(folder / "unet"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, which are one batch; masks for them; and what describes them in every way."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images", 2)
    masks = np.random.default_rng(3).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    (folder / "masks").mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(mask).convert("RGB").save(folder / "masks" / f"{number:02d}.png")
    for name, number in (("train", 0), ("reg", PRIOR)):
        (folder / name).mkdir()
        for suffix in ("png", "txt"):
            (folder / name / f"{number:02d}.{suffix}").write_bytes(
                (folder / "images" / f"{number:02d}.{suffix}").read_bytes()
            )
    entries = {f"{number:02d}": {"caption": f"a thing, number {number}"} for number in range(2)}
    (folder / "metadata.json").write_text(json.dumps(entries), encoding="utf-8")
    head = "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
    one = "[[datasets.subsets]]\nimage_dir = '{}'\n"
    text = "caption_extension = '.txt'\n"
    images = one.format(folder / "images")
    masks_beside = f"conditioning_data_dir = '{folder / 'masks'}'\n"
    sets = {
        "plain": images + text,
        "masked": images + text + masks_beside,
        "reg": one.format(folder / "train") + text + one.format(folder / "reg") + text + "is_reg = true\n",
        "masked reg": one.format(folder / "train")
        + text
        + masks_beside
        + one.format(folder / "reg")
        + text
        + masks_beside
        + "is_reg = true\n",
        "described": images + f"metadata_file = '{folder / 'metadata.json'}'\n",
    }
    for name, content in sets.items():
        (folder / f"{name}.toml").write_text(head + content, encoding="utf-8")
        with_word = "[general]\ncaption_prefix = 'zwx'\n" + head + content
        (folder / f"{name} with the word.toml").write_text(with_word, encoding="utf-8")
    return folder


def draw(number: int, purpose: str, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
    """The documented key of an example's draw in the first epoch."""
    from library.randomness import torch_generator

    return sample(torch_generator(SEED, purpose, 1, number))


def randn(number: int, purpose: str, *shape: int) -> Tensor:
    return draw(number, purpose, lambda generator: torch.randn(*shape, generator=generator))[None]


def rand(number: int, purpose: str) -> float:
    return draw(number, purpose, lambda generator: torch.rand(1, 1, 1, generator=generator)).item()


@dataclass(frozen=True)
class Told:
    """The options of a case, as numbers; the defaults are those of the command line."""

    velocity: bool = False
    low: int = 0
    high: int = 1000
    distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    snr_gamma: float = 5.0
    zero_terminal: bool = False
    offset: float = 0.0
    adaptive: float = 0.0
    offset_random: bool = False
    levels: int = 0
    discount: float = 0.3
    gamma: float = 0.0
    gamma_random: bool = False
    loss: str = "l2"
    huber: str = "snr"
    c: float = 0.1
    scale: float = 1.0
    min_snr: float = 0.0
    like_noise: bool = False
    like_velocity: float = 0.0
    debiased: bool = False
    masked: bool = False
    prior: float = 1.0


@torch.no_grad()
def expected(parts: Parts, data: Path, told: Told, word: str = "") -> float:
    """The loss of the batch of both images."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=told.zero_terminal,
    )
    images = [
        parts.encode(str(data / "images" / f"{number:02d}.png"), f"{word}a thing, number {number}")
        for number in range(2)
    ]
    latents = [
        (mean + std * randn(number, "posterior", 4, 8, 8)) * 0.18215 for number, (mean, std, _) in enumerate(images)
    ]
    noise = torch.cat([noise_of(number, latents[number], told) for number in range(2)])
    if told.levels:
        noise = noise / noise.std()
    losses = []
    for number, (_, _, context) in enumerate(images):
        t = timestep_of(number, schedule.alphas_cumprod.double(), told)
        target, mixed_in = noise[number][None], noise[number][None]
        if told.gamma:
            strength = told.gamma * (rand(number, "input_perturbation_strength") if told.gamma_random else 1)
            mixed_in = mixed_in + strength * randn(number, "input_perturbation", 4, 8, 8)
        found = parts.unet(schedule.add_noise(latents[number], mixed_in, t[None]), t, context).sample
        if told.velocity:
            target = schedule.get_velocity(latents[number], target, t[None])
        alpha = schedule.alphas_cumprod[t].item()
        errors = error_of(found - target, t.item(), alpha, told)
        if told.masked:
            mask = np.asarray(Image.open(data / "masks" / f"{number:02d}.png"), dtype=np.float32)[..., 0] / 255
            errors = errors * avg_pool2d(torch.from_numpy(mask)[None, None], 8)
        weight = told.prior if number == PRIOR else 1.0
        losses.append(errors.mean().item() * weight * weight_of(alpha / (1 - alpha), told))
    return sum(losses) / 2


def timestep_of(number: int, alphas: Tensor, told: Told) -> Tensor:
    """Uniform, or by the inverse of the distribution: of a normal logit of (t + 1/2) / 1000, or of a table."""
    if told.distribution == "uniform":
        return draw(number, "timestep", lambda generator: torch.randint(told.low, told.high, (), generator=generator))
    u = draw(number, "timestep", lambda generator: torch.rand((), dtype=torch.float64, generator=generator))
    if told.distribution == "logit_normal":
        return (1000 * torch.sigmoid(told.logit_mean + told.logit_std * torch.special.ndtri(u))).long()
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=told.snr_gamma) / (snr + 1 if told.velocity else snr)
    return (weights.cumsum(0) < u * weights.sum()).sum()


def noise_of(number: int, latents: Tensor, told: Told) -> Tensor:
    noise = randn(number, "noise", 4, 8, 8)
    strength: Tensor | float = told.offset * (rand(number, "noise_offset_strength") if told.offset_random else 1)
    if told.adaptive:
        strength = (strength + told.adaptive * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    noise = noise + strength * randn(number, "noise_offset", 4, 1, 1)
    if told.levels:

        def pyramid(generator: torch.Generator) -> Tensor:
            ratios = 2 + 2 * torch.rand(told.levels, generator=generator)
            total = torch.zeros(1, 4, 8, 8)
            for level in range(told.levels):
                side = max(1, int(8 / ratios[level].item() ** level))
                small = torch.randn(1, 4, side, side, generator=generator)
                total += interpolate(small, size=(8, 8), mode="bilinear") * told.discount**level
                if side == 1:
                    break
            return total

        noise = noise + draw(number, "multires", pyramid)
    return noise


def error_of(difference: Tensor, t: int, alpha: float, told: Told) -> Tensor:
    if told.loss == "l2":
        return difference**2
    if told.loss == "l1":
        return difference.abs()
    sigma = math.sqrt((1 - alpha) / alpha)
    c = {
        "constant": told.c * told.scale,
        "exponential": math.exp(t * math.log(told.c) / 1000) * told.scale,
        "snr": (1 - told.c) / (1 + sigma) ** 2 + told.c,
    }[told.huber]
    return (c if told.loss == "huber" else 1) * 2 * ((difference**2 + c**2).sqrt() - c)


def weight_of(snr: float, told: Told) -> float:
    weight = 1.0
    if told.min_snr:
        weight *= min(snr, told.min_snr) / (snr + 1 if told.velocity else snr)
    if told.like_noise:
        weight *= snr / (snr + 1)
    if told.like_velocity:
        weight *= 1 + told.like_velocity * (snr + 1) / snr
    if told.debiased:
        weight *= 1 / (snr + 1) if told.velocity else 1 / math.sqrt(snr)
    return weight


Case = tuple[str, Told]
HUBER = "--loss_type=huber --huber_c=0.2"
SMOOTH = "--loss_type=smooth_l1 --huber_c=0.2"
NORMAL = "--timestep_distribution=logit_normal --timestep_logit_mean=1 --timestep_logit_std=0.5"
BY_SNR = "--timestep_distribution=snr --timestep_snr_gamma=1"
ALL_WEIGHTS = Told(min_snr=1, like_velocity=0.5, debiased=True)
CASES: list[Case] = [
    ("", Told()),
    ("--min_snr_gamma=1", Told(min_snr=1)),
    ("--v_pred_like_loss=0.5", Told(like_velocity=0.5)),
    ("--debiased_estimation_loss", Told(debiased=True)),
    ("--min_snr_gamma=1 --v_pred_like_loss=0.5 --debiased_estimation_loss", ALL_WEIGHTS),
    ("--zero_terminal_snr --min_snr_gamma=1", Told(zero_terminal=True, min_snr=1)),
    ("--noise_offset=0.3", Told(offset=0.3)),
    ("--noise_offset=0.3 --noise_offset_random_strength", Told(offset=0.3, offset_random=True)),
    ("--noise_offset=0.3 --adaptive_noise_scale=0.8", Told(offset=0.3, adaptive=0.8)),
    ("--multires_noise_iterations=6", Told(levels=6)),
    ("--multires_noise_iterations=3 --multires_noise_discount=0.8", Told(levels=3, discount=0.8)),
    ("--ip_noise_gamma=2", Told(gamma=2)),
    ("--ip_noise_gamma=2 --ip_noise_gamma_random_strength", Told(gamma=2, gamma_random=True)),
    ("--min_timestep=700", Told(low=700)),
    ("--max_timestep=100", Told(high=100)),
    (NORMAL, Told(distribution="logit_normal", logit_mean=1, logit_std=0.5)),
    (BY_SNR, Told(distribution="snr", snr_gamma=1)),
    ("--loss_type=l1", Told(loss="l1")),
    (HUBER, Told(loss="huber", c=0.2)),
    (f"{HUBER} --huber_schedule=constant --huber_scale=2", Told(loss="huber", huber="constant", c=0.2, scale=2)),
    (f"{HUBER} --huber_schedule=exponential --huber_scale=2", Told(loss="huber", huber="exponential", c=0.2, scale=2)),
    (SMOOTH, Told(loss="smooth_l1", c=0.2)),
    (f"{SMOOTH} --huber_schedule=constant", Told(loss="smooth_l1", huber="constant", c=0.2)),
    (f"{SMOOTH} --huber_schedule=exponential", Told(loss="smooth_l1", huber="exponential", c=0.2)),
    ("--masked_loss", Told(masked=True)),
    ("--prior_loss_weight=0.25", Told(prior=0.25)),
]
VELOCITY: list[Case] = [
    ("", Told(velocity=True)),
    ("--min_snr_gamma=1", Told(velocity=True, min_snr=1)),
    ("--scale_v_pred_loss_like_noise_pred", Told(velocity=True, like_noise=True)),
    ("--debiased_estimation_loss", Told(velocity=True, debiased=True)),
    ("--zero_terminal_snr --min_snr_gamma=1", Told(velocity=True, zero_terminal=True, min_snr=1)),
]


def dataset_of(script: str, options: str) -> str:
    """The data set that an option needs, as the script takes it."""
    if script == "fine_tune":
        return "described"
    needed = {"masked": "--masked_loss", "reg": "--prior_loss_weight"}
    name = " ".join(name for name, option in needed.items() if option in options) or "plain"
    return f"{name} with the word" if script in WORDS else name


def first_loss(script: str, parts: Parts, data: Path, output: Path, options: str, own: list[str]) -> float:
    told = options.split()
    common = [
        f"--pretrained_model_name_or_path={parts.folder}",
        f"--dataset_config={data / f'{dataset_of(script, options)}.toml'}",
        "--max_train_steps=1",
        "--max_data_loader_n_workers=0",
        "--no_report",
    ]
    (loss,) = run_script(script, output, *common, *own, *told).losses
    return loss


NETWORK = ["--network_module=networks.lora", "--network_dim=1", "--learning_rate=1e-4"]


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [*(("sd1", *case) for case in CASES), *(("sd2_v", *case) for case in VELOCITY)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_networks(kind: str, options: str, told: Told, models: dict[str, Parts], data: Path, tmp_path: Path) -> None:
    """A fresh network changes nothing, so the model's own error is what counts."""
    found = first_loss("train_network", models[kind], data, tmp_path, options, [*NETWORK, *FLAGS[kind]])
    assert found == pytest.approx(expected(models[kind], data, told), rel=2e-4)


def test_every_case_is_another_loss(models: dict[str, Parts], data: Path) -> None:
    """So no case could be passed by leaving its option out."""
    for kind, cases in (("sd1", CASES), ("sd2_v", VELOCITY)):
        losses = sorted((expected(models[kind], data, told), options) for options, told in cases)
        alike = [pair for pair in zip(losses, losses[1:], strict=False) if pair[1][0] / pair[0][0] < 1 + 1e-3]
        assert not alike


# --- the other scripts: every option, several at a time

WORDS = ("train_textual_inversion", "train_textual_inversion_XTI")
WORD = ["--learning_rate=1e-3", "--token_string=zwx", "--init_word=dog"]
OWN = {
    "train_db": ["--learning_rate=1e-6"],
    "fine_tune": ["--learning_rate=1e-6"],
    "train_textual_inversion": WORD,
    "train_textual_inversion_XTI": WORD,
}
SPOTS: dict[str, tuple[str, str, Told]] = {
    "first": (
        "sd1",
        f"{HUBER} --huber_schedule=exponential --huber_scale=2 --min_snr_gamma=1 --max_timestep=600 "
        "--noise_offset=0.3 --noise_offset_random_strength",
        Told(loss="huber", huber="exponential", c=0.2, scale=2, min_snr=1, high=600, offset=0.3, offset_random=True),
    ),
    "second": (
        "sd1",
        "--v_pred_like_loss=0.5 --debiased_estimation_loss --multires_noise_iterations=3 --multires_noise_discount=0.8 "
        "--ip_noise_gamma=2 --ip_noise_gamma_random_strength --min_timestep=300",
        Told(like_velocity=0.5, debiased=True, levels=3, discount=0.8, gamma=2, gamma_random=True, low=300),
    ),
    "third": (
        "sd1",
        f"{SMOOTH} --huber_schedule=constant --noise_offset=0.3 --adaptive_noise_scale=5",
        Told(loss="smooth_l1", huber="constant", c=0.2, offset=0.3, adaptive=5),
    ),
    "masks": (
        "sd1",
        f"{HUBER} --masked_loss --prior_loss_weight=0.25",
        Told(loss="huber", c=0.2, masked=True, prior=0.25),
    ),
    "velocity": (
        "sd2_v",
        f"--loss_type=l1 --scale_v_pred_loss_like_noise_pred --zero_terminal_snr {BY_SNR}",
        Told(velocity=True, loss="l1", like_noise=True, zero_terminal=True, distribution="snr", snr_gamma=1),
    ),
    "more velocity": (
        "sd2_v",
        f"--min_snr_gamma=1 --debiased_estimation_loss {NORMAL}",
        Told(velocity=True, min_snr=1, debiased=True, distribution="logit_normal", logit_mean=1, logit_std=0.5),
    ),
}


@pytest.mark.parametrize(
    ("script", "spot"),
    [(script, spot) for script in OWN for spot in SPOTS if (script, spot) != ("fine_tune", "masks")],
)
def test_other_scripts(script: str, spot: str, models: dict[str, Parts], data: Path, tmp_path: Path) -> None:
    """A new word begins as the one that it is made of, in every layer; fine_tune.py refuses masks."""
    kind, options, told = SPOTS[spot]
    model = models[kind + WITH_16_BLOCKS if script == WORDS[1] else kind]
    found = first_loss(script, model, data, tmp_path, options, [*OWN[script], *FLAGS[kind]])
    assert found == pytest.approx(expected(model, data, told, "dog " if script in WORDS else ""), rel=2e-4)


def test_every_option_of_a_spot_counts(models: dict[str, Parts], data: Path) -> None:
    """Each with the others as they are; and every option there is comes in one of the spots."""
    plain = Told()
    for kind, _, told in SPOTS.values():
        whole = expected(models[kind], data, told)
        for name in [one.name for one in fields(told) if getattr(told, one.name) != getattr(plain, one.name)]:
            if name != "velocity":
                without = expected(models[kind], data, replace(told, **{name: getattr(plain, name)}))
                assert abs(without / whole - 1) > 1e-3, (told, name)
    told_of = {name for _, options, _ in SPOTS.values() for name in re.findall(r"--(\w+)", options)}
    assert told_of == {name for options, _ in (*CASES, *VELOCITY) for name in re.findall(r"--(\w+)", options)}
