"""Every option of the reference's training scripts, for Stable Diffusion 1 and 2, is exercised: none is only taken.

Three kinds of proof, each of which fails if an option is ignored:

- here, the batches that a script would train on differ with the option (``BATCHES``);
- here, what ``--dry_run`` prints differs with it (``SCREEN``), or a model card does (``CARD``);
- elsewhere, a test that is named (``ELSEWHERE``).

Options that are refused are listed with the reason; everything else in the reference's lists must be in one table.
Options of our own (``ADDED``) name their tests as well.
"""

import ast
import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from library.data.dataset import TrainingDataset
from library.data.disk_cache import DiskLatentCache
from library.data.setup import prepare_data
from library.errors import UserError
from library.files import read_metadata
from library.inputs import read_data
from library.models.latents import encode_images
from library.option_fields import declarations
from library.options import parse_options
from library.runtime import start_runtime
from library.runtime_options import RuntimeOptions
from library.training.metadata import ModelFacts, modelspec
from library.training.updates import FusedUpdate
from tests.library.data.small_set import tokenize
from tests.scripts.runs import run_script, write_dataset, write_images
from tests.tiny import tiny_sd

TESTS = Path(__file__).parent
SCRIPTS = ("train_network", "train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI")
REFERENCE: dict[str, set[str]] = {
    script.removesuffix(".py"): {row["name"] for row in rows}
    for name in ("flags", "flags_textual_inversion")
    for script, rows in json.loads((TESTS / "golden" / f"{name}.json").read_text()).items()
    if script.endswith(".py")
}
OPTIONS = {script: importlib.import_module(script).Options for script in SCRIPTS}
WORDS = ("train_textual_inversion", "train_textual_inversion_XTI")


def having(name: str) -> list[str]:
    """The scripts whose reference has an option, and that declare it."""
    return [script for script in SCRIPTS if name in REFERENCE[script]]


@dataclass(frozen=True)
class Change:
    """An option to be added to others; ``{}`` in both stands for the folder of the images.

    Attributes:
        option: The flag with its value.
        context: What it is added to.
    """

    option: str
    context: str = ""


# --- the batches that are trained on

FOLDERS = "--train_data_dir={}/img"
FILE = "--train_data_dir={}/img/1_one --in_json={}/one.json"
BUCKETS = "--enable_bucket --min_bucket_reso=32 --max_bucket_reso=128 --bucket_reso_steps=8"
"""Are part of every context."""
CROPPED = "--no_enable_bucket --random_crop"
TEXT = "--caption_extension=.txt"
SHUFFLED = f"{TEXT} --shuffle_caption"
REG = f"{FOLDERS} --reg_data_dir={{}}/reg"

REFUSED: dict[str, str] = {
    "dataset_class": "a data set is described, not programmed",
    "deepspeed": "it changes weights before they could be checked",
}
"""Refused, with the reason."""

BATCHES: dict[str, Change] = {
    "train_data_dir": Change("--train_data_dir={}/reg"),
    "reg_data_dir": Change("--reg_data_dir={}/reg"),
    "in_json": Change("--in_json={}/two.json", FILE),
    "dataset_repeats": Change("--dataset_repeats=2", FILE),
    "dataset_config": Change("--dataset_config={}/two.toml", "--dataset_config={}/one.toml"),
    "dataset_class": Change("--dataset_class=my.Class"),
    "prior_loss_weight": Change("--prior_loss_weight=0.5", REG),
    "caption_extension": Change("--caption_extension=.txt"),
    "caption_extention": Change("--caption_extention=.txt"),
    "caption_separator": Change("--caption_separator=;", SHUFFLED),
    "shuffle_caption": Change("--shuffle_caption", TEXT),
    "keep_tokens": Change("--keep_tokens=2", SHUFFLED),
    "keep_tokens_separator": Change("--keep_tokens_separator=|||", SHUFFLED),
    "secondary_separator": Change("--secondary_separator=;;;", TEXT),
    "enable_wildcard": Change("--enable_wildcard", TEXT),
    "caption_prefix": Change("--caption_prefix=before", TEXT),
    "caption_suffix": Change("--caption_suffix=behind", TEXT),
    "token_warmup_min": Change("--token_warmup_min=3", f"{TEXT} --token_warmup_step=9"),
    "token_warmup_step": Change("--token_warmup_step=9", TEXT),
    "caption_dropout_rate": Change("--caption_dropout_rate=0.5", TEXT),
    "caption_dropout_every_n_epochs": Change("--caption_dropout_every_n_epochs=2", TEXT),
    "caption_tag_dropout_rate": Change("--caption_tag_dropout_rate=0.5", TEXT),
    "color_aug": Change("--color_aug"),
    "flip_aug": Change("--flip_aug"),
    "face_crop_aug_range": Change("--face_crop_aug_range=1.0,2.0", CROPPED),
    "random_crop": Change("--random_crop"),
    "resolution": Change("--resolution=32"),
    "enable_bucket": Change("--enable_bucket", CROPPED),
    "min_bucket_reso": Change("--min_bucket_reso=64"),
    "max_bucket_reso": Change("--max_bucket_reso=64"),
    "bucket_reso_steps": Change("--bucket_reso_steps=32"),
    "bucket_no_upscale": Change("--bucket_no_upscale", "--resolution=96"),
    "resize_interpolation": Change("--resize_interpolation=nearest"),
    "train_batch_size": Change("--train_batch_size=2", CROPPED),
    "alpha_mask": Change("--alpha_mask"),
    "masked_loss": Change("--masked_loss", "--conditioning_data_dir={}/masks"),
    "conditioning_data_dir": Change("--conditioning_data_dir={}/masks", "--masked_loss"),
}
"""Without a set in its context an option is added to the folders; ``fine_tune`` is checked with the same folders."""


def write_image(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name) + size[0])
    pixels = rng.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    one = folder / "img" / "1_one"
    sizes = {"a_30_30_16_16": (64, 64), "b_40_30_12_12": (112, 64), "c_20_20_8_8": (64, 80), "d_32_60_20_20": (72, 120)}
    for name, size in sizes.items():
        write_image(one / f"{name}.png", size, "RGBA" if name.startswith("a") else "RGB")
        write_image(folder / "masks" / f"{name}.png", size)
        text = f"{name}, {{red/blue}}, tall ||| x, small;;;round, y; z\nsecond line of {name}"
        (one / f"{name}.txt").write_text(text, encoding="utf-8")
        (one / f"{name}.caption").write_text(f"other {name}", encoding="utf-8")
    write_image(folder / "reg" / "1_two" / "e_20_20_8_8.png", (64, 64))
    for number, name in enumerate(("one", "two")):
        entries = {f"{stem}.png": {"caption": f"{name} {stem}, red, green, blue"} for stem in list(sizes)[number:]}
        (folder / f"{name}.json").write_text(json.dumps(entries), encoding="utf-8")
        subset = f"[[datasets.subsets]]\nimage_dir = '{one}'\nclass_tokens = '{name}'\ncaption_extension = '.none'\n"
        (folder / f"{name}.toml").write_text(f"[[datasets]]\n{subset}", encoding="utf-8")
    return folder


def batches(script: str, words: str, folder: Path) -> list[object]:
    """Everything in the batches of two epochs, or what is wrong with the options."""
    given = words.replace("{}", str(folder)).split()
    if not any(word.startswith(("--train_data_dir", "--dataset_config")) for word in given):
        given.insert(0, FOLDERS.replace("{}", str(folder)))
    own = ["--token_string=zwx"] if script in WORDS else []
    argv = ["--resolution=64", "--seed=7", *BUCKETS.split(), *own, *given]
    try:
        options = parse_options(OPTIONS[script], argv, prog=script, description="", announce=lambda text: None)
        spec, records = read_data(options)
    except UserError as error:
        return [str(error)]
    data = prepare_data(spec, records)
    plan = data.plan(7, accumulation=1, world=1)
    dataset = TrainingDataset(
        data=data, seed=7, total_steps=10, tokenize=tokenize, prior_loss_weight=options.source.prior_loss_weight
    )
    seen: list[object] = []
    for key in plan.micro_batches(0, 2 * plan.steps_per_epoch, 0):
        batch = dataset[key]
        pixels = batch.pixels.numpy()
        mask = None if batch.mask is None else batch.mask.numpy().tobytes()
        seen.append((key.step, batch.captions, pixels.shape, pixels.tobytes(), mask, batch.loss_weight.tolist()))
    return seen


@pytest.fixture(scope="module")
def usual_batches(images: Path) -> Callable[[str, str], list[object]]:
    return cache(lambda script, context: batches(script, context, images))


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for name in BATCHES for script in having(name)], ids=lambda value: value
)
def test_the_batches_differ(
    script: str, name: str, images: Path, usual_batches: Callable[[str, str], list[object]]
) -> None:
    change = BATCHES[name]
    before = usual_batches(script, change.context)
    after = batches(script, f"{change.context} {change.option}", images)
    assert before != after
    assert isinstance(after[0], tuple) == (name not in REFUSED), after


# --- what a dry run prints

EPOCHS = "--max_train_epochs=4"
EVERY_EPOCH = f"{EPOCHS} --save_every_n_epochs=1"
EVERY_STEP = "--save_every_n_steps=2"
STATES = "--save_state"
PREVIEWS = "--sample_every_n_steps=4 --sample_prompts={}/prompts.txt"
HELD_OUT = "--validation_split=0.5"
WARM = "--lr_scheduler=constant_with_warmup"

SCREEN: dict[str, Change] = {
    "output_dir": Change("--output_dir={}/elsewhere"),
    "output_name": Change("--output_name=thing"),
    "max_train_steps": Change("--max_train_steps=7"),
    "max_train_epochs": Change("--max_train_epochs=3"),
    "gradient_accumulation_steps": Change("--gradient_accumulation_steps=2"),
    "seed": Change("--seed=8", SHUFFLED),
    "learning_rate": Change("--learning_rate=3e-4"),
    "lr_scheduler": Change("--lr_scheduler=cosine"),
    "lr_warmup_steps": Change("--lr_warmup_steps=3", WARM),
    "lr_decay_steps": Change("--lr_decay_steps=3", "--lr_scheduler=warmup_stable_decay"),
    "lr_scheduler_num_cycles": Change("--lr_scheduler_num_cycles=2", "--lr_scheduler=cosine_with_restarts"),
    "lr_scheduler_power": Change("--lr_scheduler_power=3", "--lr_scheduler=polynomial"),
    "lr_scheduler_timescale": Change("--lr_scheduler_timescale=2", "--lr_scheduler=inverse_sqrt"),
    "lr_scheduler_min_lr_ratio": Change(
        "--lr_scheduler_min_lr_ratio=0.5", "--lr_scheduler=cosine_with_min_lr --lr_scheduler_min_lr_ratio=0.1"
    ),
    "optimizer_type": Change("--optimizer_type=Prodigy"),
    "save_precision": Change("--save_precision=fp16", "--mixed_precision=bf16"),
    "save_every_n_epochs": Change("--save_every_n_epochs=1", EPOCHS),
    "save_every_n_steps": Change("--save_every_n_steps=2"),
    "save_n_epoch_ratio": Change("--save_n_epoch_ratio=2", EPOCHS),
    "save_last_n_epochs": Change("--save_last_n_epochs=1", EVERY_EPOCH),
    "save_last_n_epochs_state": Change("--save_last_n_epochs_state=1", f"{EVERY_EPOCH} {STATES}"),
    "save_last_n_steps": Change("--save_last_n_steps=2", EVERY_STEP),
    "save_last_n_steps_state": Change("--save_last_n_steps_state=2", f"{EVERY_STEP} {STATES}"),
    "save_state": Change("--save_state", EVERY_STEP),
    "save_state_on_train_end": Change("--save_state_on_train_end"),
    "save_model_as": Change("--save_model_as=ckpt"),
    "sample_every_n_steps": Change("--sample_every_n_steps=3", PREVIEWS),
    "sample_every_n_epochs": Change("--sample_every_n_epochs=1", f"{EPOCHS} {PREVIEWS}"),
    "sample_at_first": Change("--sample_at_first", PREVIEWS),
    "sample_prompts": Change("--sample_prompts={}/others.txt", PREVIEWS),
    "sample_sampler": Change("--sample_sampler=euler_a", PREVIEWS),
    "validation_split": Change(HELD_OUT),
    "validation_seed": Change("--validation_seed=6", HELD_OUT),
    "validate_every_n_steps": Change("--validate_every_n_steps=2", HELD_OUT),
    "validate_every_n_epochs": Change("--validate_every_n_epochs=2", HELD_OUT),
    "max_validation_steps": Change("--max_validation_steps=1", HELD_OUT),
    "lowram": Change("--lowram"),
    "deepspeed": Change("--deepspeed"),
    "zero_stage": Change("--zero_stage=3"),
    "offload_optimizer_device": Change("--offload_optimizer_device=cpu"),
    "offload_optimizer_nvme_path": Change("--offload_optimizer_nvme_path={}"),
    "offload_param_device": Change("--offload_param_device=cpu"),
    "offload_param_nvme_path": Change("--offload_param_nvme_path={}"),
    "zero3_init_flag": Change("--zero3_init_flag"),
    "zero3_save_16bit_model": Change("--zero3_save_16bit_model"),
    "fp16_master_weights_and_gradients": Change("--fp16_master_weights_and_gradients"),
    "network_dim": Change("--network_dim=8"),
    "network_args": Change("--network_args conv_dim=4"),
    "network_train_unet_only": Change("--network_train_unet_only"),
    "network_train_text_encoder_only": Change("--network_train_text_encoder_only"),
    "train_text_encoder": Change("--train_text_encoder", STATES),
    "num_vectors_per_token": Change("--num_vectors_per_token=3"),
    "token_string": Change("--token_string=qqz", "--use_object_template"),
    "use_object_template": Change("--use_object_template"),
    "use_style_template": Change("--use_style_template"),
    "console_log_level": Change("--console_log_level=ERROR", "--lowram"),
    "console_log_simple": Change("--console_log_simple", "--lowram"),
    "console_log_file": Change("--console_log_file={}/log.txt", "--lowram"),
}
"""What the plan, a notice or a refusal shows: of options of the right value the plan, as far as it is short."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    for name, lines in (("prompts", 1), ("others", 2)):
        (images / f"{name}.txt").write_text("a thing\n" * lines, encoding="utf-8")
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", layers_per_block=1)


def screen(script: str, words: str, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a dry run prints on both streams, or what it refuses, without what differs from run to run."""
    given = words.replace("{}", str(folder)).split()
    own = {"train_network": ["--network_module=networks.lora"]}.get(script, [])
    if script in WORDS:
        own = ["--token_string=zwx", "--caption_prefix=zwx"]
    source = FILE if script == "fine_tune" else FOLDERS
    argv = ["--dry_run", f"--pretrained_model_name_or_path={model}", "--resolution=64", "--seed=7", *BUCKETS.split()]
    argv += [f"--output_dir={folder}/out", "--max_train_steps=10", TEXT, *source.replace("{}", str(folder)).split()]
    capsys.readouterr()
    try:
        importlib.import_module(script).main([*argv, *own, *given])
    except UserError as error:
        return [f"refused: {error}"]
    shown = capsys.readouterr()
    # Neither times, nor space on the disk, nor that a flag is given twice say anything about what it does.
    lines = (line.partition(" WARNING ")[2] or line for line in f"{shown.out}\n{shown.err}".splitlines())
    return [re.sub(r"; \S+ GB free", "", line) for line in lines if "given more than once" not in line]


@pytest.fixture(scope="module")
def usual_screens() -> dict[tuple[str, str], list[str]]:
    """Screens without the options, each printed once."""
    return {}


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for name in SCREEN for script in having(name)], ids=lambda value: value
)
def test_the_screen_differs(
    script: str,
    name: str,
    model: Path,
    images: Path,
    usual_screens: dict[tuple[str, str], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = SCREEN[name]
    usual = (script, change.context)
    if usual not in usual_screens:
        usual_screens[usual] = screen(*usual, model, images, capsys)
    before = usual_screens[usual]
    after = screen(script, f"{change.context} {change.option}", model, images, capsys)
    assert not before[0].startswith("refused"), before
    assert before != after
    assert after[0].startswith("refused") == (name in REFUSED), after


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_screen_is_the_same(
    script: str, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without this, every screen would differ from every other."""
    seen = [screen(script, words, model, images, capsys) for words in ("", "--caption_separator=,")]
    assert seen[0] == seen[1]
    batch = [batches(script, words, images) for words in ("", "--caption_separator=,")]
    assert batch[0] == batch[1]


# --- model cards

CARD = {
    "title": "Mine",
    "author": "me",
    "description": "things",
    "license": "CC0",
    "tags": "a, b",
    "usage_hint": "gently",
    "thumbnail": "data:image/png;base64,AA==",
    "merged_from": "this and that",
    "trigger_phrase": "zwx",
    "preprocessor": "none",
    "is_negative_embedding": "true",
}
"""Value of every ``--metadata_x``, which becomes ``modelspec.x``."""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", CARD)
def test_the_card_tells(script: str, name: str) -> None:
    own = ["--token_string=zwx"] if script in WORDS else []
    argv = [f"--metadata_{name}={CARD[name]}", *own]
    options = parse_options(OPTIONS[script], argv, prog=script, description="", announce=lambda text: None)
    facts = ModelFacts(kind="lora", base_model_version="sd_v1", output_name="other")
    assert modelspec(options.metadata, facts, timestamp=0)[f"modelspec.{name}"] == CARD[name]


# --- what two steps leave

RUNS: dict[str, Change] = {
    "weighted_captions": Change("--weighted_captions"),
    "clip_skip": Change("--clip_skip=2"),
    "max_token_length": Change("--max_token_length=150"),
    "vae": Change("--vae={}/other/vae"),
    "mixed_precision": Change("--mixed_precision=bf16"),
    "max_grad_norm": Change("--max_grad_norm=1e-4", "--optimizer_type=SGDNesterov --optimizer_args momentum=0.9"),
    "optimizer_args": Change("--optimizer_args weight_decay=0.5"),
    "use_lion_optimizer": Change("--use_lion_optimizer"),
    "network_alpha": Change("--network_alpha=2"),
    "network_dropout": Change("--network_dropout=0.5"),
    "network_weights": Change("--network_weights={}/lora.safetensors"),
    "scale_weight_norms": Change("--scale_weight_norms=0.01"),
    "base_weights": Change("--base_weights {}/lora.safetensors"),
    "base_weights_multiplier": Change("--base_weights_multiplier 3", "--base_weights {}/lora.safetensors"),
    "unet_lr": Change("--unet_lr=5e-3"),
    "text_encoder_lr": Change("--text_encoder_lr 5e-3"),
    "training_comment": Change("--training_comment=mine"),
    "no_metadata": Change("--no_metadata"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[float], str, tuple[str, int]]]:
    """Losses, tensors, and the record of a short run of ``train_network``, by what is added to its command line."""
    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("sd1", 0), ("other", 1)):
        tiny_sd(folder / name, layers_per_block=1, seed=seed)
    images = write_images(folder / "img", 2)
    for path in images.glob("*.txt"):
        path.write_text("a (thing:1.8) " + "of red and green and blue colours, " * 12, encoding="utf-8")
    dataset = write_dataset(folder, images=2)
    for path in images.glob("*.txt"):
        (folder / "images" / path.name).write_bytes(path.read_bytes())

    @cache
    def run(words: str) -> tuple[list[float], str, tuple[str, int]]:
        output = tmp_path_factory.mktemp("out")
        given = [f"--pretrained_model_name_or_path={folder / 'sd1'}", f"--dataset_config={dataset}"]
        given += ["--network_module=networks.lora", "--network_dim=2", "--learning_rate=1e-2", "--max_train_steps=2"]
        given += ["--max_data_loader_n_workers=0", "--no_report", *words.replace("{}", str(folder)).split()]
        done = run_script("train_network", output, *given)
        result = output / "last.safetensors"
        record = read_metadata(result)
        if not words:
            (folder / "lora.safetensors").write_bytes(result.read_bytes())
        return done.losses, done.tensor_hash(), (record.get("ss_training_comment", ""), len(record))

    run("")
    return run


@pytest.mark.parametrize("name", RUNS)
def test_the_run_differs(name: str, trained: Callable[[str], tuple[list[float], str, tuple[str, int]]]) -> None:
    change = RUNS[name]
    assert trained(change.context) != trained(f"{change.context} {change.option}".strip())


def test_the_same_run_is_the_same(trained: Callable[[str], tuple[list[float], str, tuple[str, int]]]) -> None:
    """Without this, every run would differ from every other."""
    assert trained("") == trained("--caption_separator=,")


def test_vae_batch_size(trained: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def encode(vae: object, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(pixels))
        return encode_images(vae, pixels)

    monkeypatch.setattr("library.task.encode_images", encode)
    trained("--cache_latents --vae_batch_size=2")
    assert seen == [2]
    trained("--vae_batch_size=1")
    assert seen == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("keeps", [True, False])
def test_highvram(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    runtime = start_runtime(RuntimeOptions(seed=3, highvram=keeps), find_unused_parameters=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    runtime.release_memory()
    assert bool(emptied) != keeps


def test_gradient_checkpointing(trained: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that are not kept are computed twice."""
    from diffusers.models.resnet import ResnetBlock2D

    calls: list[bool] = []
    original = ResnetBlock2D.forward

    def forward(module: ResnetBlock2D, *given: object, **named: object) -> torch.Tensor:
        calls.append(True)
        return original(module, *given, **named)

    monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    trained("--max_token_length=225")
    plain = len(calls)
    trained("--max_token_length=225 --gradient_checkpointing")
    assert len(calls) - plain > plain


def test_fused_backward_pass(trained: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def watched(*given: object, **named: object) -> FusedUpdate:
        made.append(True)
        return FusedUpdate(*given, **named)

    monkeypatch.setattr("library.run.FusedUpdate", watched)
    trained("--fused_backward_pass --max_grad_norm=0")
    assert made


@pytest.mark.parametrize("narrow", [True, False])
def test_full_fp16(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients need another scaler; asked for as on a GPU, since a CPU does not train fp16."""
    taken: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("library.runtime._accelerator", lambda *given, **named: MagicMock())
    monkeypatch.setattr("library.runtime._unscale_fp16_gradients", lambda *given: taken.append(True))
    options = RuntimeOptions(seed=3, mixed_precision="fp16", full_fp16=narrow)
    assert start_runtime(options, find_unused_parameters=False).trains_narrow == narrow
    assert bool(taken) == narrow


def test_max_data_loader_n_workers(trained: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def loader(*given: object, num_workers: int, **named: object) -> DataLoader[object]:
        asked.append(num_workers)
        return DataLoader(*given, num_workers=0, **{**named, "worker_init_fn": None, "prefetch_factor": None})

    monkeypatch.setattr("library.data.loader.available_processors", lambda: 8)
    monkeypatch.setattr("library.data.loader.DataLoader", loader)
    trained("--max_data_loader_n_workers=3")
    assert asked == [3]


@pytest.mark.parametrize("trusts", [True, False])
def test_skip_cache_check(trusts: bool, trained: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it means for an entry is shown in ``library/data/test_disk_cache.py``."""
    seen: list[object] = []
    fill = DiskLatentCache.fill

    def watched(*given: object, **named: object) -> DiskLatentCache:
        seen.append(named["trust_names"])
        return fill(*given, **named)

    monkeypatch.setattr(DiskLatentCache, "fill", watched)
    trained("--cache_latents_to_disk" + " --skip_cache_check" * trusts)
    assert seen == [trusts]


@pytest.mark.parametrize("remembers", [True, False])
def test_cache_info(remembers: bool, images: Path, tmp_path: Path) -> None:
    """How it is used is shown in ``library/data/test_info_file.py``."""
    shutil.copytree(images / "reg", tmp_path / "img")
    argv = [f"--train_data_dir={tmp_path / 'img'}", "--resolution=64", *["--cache_info"] * remembers]
    options = parse_options(OPTIONS["train_network"], argv, prog="x", description="", announce=lambda text: None)
    read_data(options)
    assert (tmp_path / "img" / "1_two" / "metadata_cache.json").exists() == remembers


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_config(script: str, tmp_path: Path) -> None:
    own = ["--token_string=zwx"] if script in WORDS else []
    argv = [f"--config_file={tmp_path / 'a'}", "--output_config", "--seed=5", *own]
    with pytest.raises(SystemExit):
        parse_options(OPTIONS[script], argv, prog=script, description="")
    assert "seed = 5\n" in (tmp_path / "a.toml").read_text(encoding="utf-8")


# --- tests elsewhere

LOSS = "scripts/test_loss_by_reference.py::test_networks"
RUNTIME = "library/test_precision_of_runtime.py"
HUB = "library/training/test_hub.py"
LOGS = "scripts/test_logging.py::test_both_loggers"
SEVERAL = f"{RUNTIME}::test_options_of_several_processes_reach_accelerate"
UPLOADS = "scripts/test_hub_uploads.py"
STATE_ON_HUB = f"{UPLOADS}::test_removed_files_arrive_and_stay_on_the_hub_and_states_continue_from_there"
VELOCITY = "scripts/test_train_network.py::test_losses_are_the_stored_ones"
WORD = "scripts/test_textual_inversion.py"
EMA = "scripts/test_validation_and_ema.py"

ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(
        (
            *("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations"),
            *("multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength", "zero_terminal_snr"),
            *("min_timestep", "max_timestep", "loss_type", "huber_schedule", "huber_c", "huber_scale"),
            *("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss"),
        ),
        LOSS,
    ),
    **dict.fromkeys(("v2", "v_parameterization", "pretrained_model_name_or_path"), VELOCITY),
    **dict.fromkeys(("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"), SEVERAL),
    **dict.fromkeys(
        ("log_with", "log_prefix", "log_tracker_name", "wandb_run_name", "log_tracker_config", "wandb_api_key"), LOGS
    ),
    "log_config": LOGS,
    "logging_dir": "library/training/test_log_targets.py::test_all_logs_to_both",
    **dict.fromkeys(
        ("huggingface_repo_id", "huggingface_path_in_repo"), f"{HUB}::test_twenty_uploads_with_faults_arrive_once"
    ),
    **dict.fromkeys(
        ("huggingface_repo_type", "huggingface_repo_visibility"),
        f"{HUB}::test_visibility_and_type_of_a_new_repository",
    ),
    "huggingface_token": f"{HUB}::test_tokens_that_are_refused_end_the_run",
    "async_upload": f"{UPLOADS}::test_twenty_uploads_with_faults_leave_training_as_it_is",
    **dict.fromkeys(("save_state_to_huggingface", "resume_from_huggingface"), STATE_ON_HUB),
    **dict.fromkeys(
        ("initial_step", "initial_epoch"), "scripts/test_resuming.py::test_a_run_begins_where_it_is_told_to"
    ),
    "resume": "scripts/test_train_db.py::test_a_resumed_run_equals_the_uninterrupted_one",
    "config_file": "scripts/test_gui_files.py::test_it_runs_unchanged",
    "tokenizer_cache_dir": "library/models/test_stable_diffusion.py::test_the_tokenizer_folder_of_the_option_wins",
    "debug_dataset": "scripts/test_inspection.py::test_debug_dataset_writes_pictures_and_ends",
    "cache_latents_to_disk": "scripts/test_caching.py::test_the_cache_on_disk_trains_as_the_one_in_memory",
    "mem_eff_attn": "library/models/test_attention.py::test_mem_eff_attn_equals_sdpa_in_unet_and_vae",
    "xformers": "library/models/test_attention.py::test_xformers_falls_back_to_sdpa_with_one_warning",
    "diffusers_xformers": "scripts/test_fine_tune.py::test_diffusers_xformers_means_xformers",
    "torch_compile": f"{RUNTIME}::test_compiled_modules_keep_their_names",
    "dynamo_backend": f"{RUNTIME}::test_a_backend_that_is_not_there_is_refused_with_those_that_are",
    "cpu_offload_checkpointing": "scripts/test_precision.py::test_checkpoints_in_main_memory_change_nothing",
    "fp8_base": "scripts/test_precision.py::test_a_frozen_base_in_8_bits",
    "fp8_base_unet": "scripts/test_precision.py::test_a_frozen_base_in_8_bits",
    "full_bf16": "scripts/test_precision.py::test_full_bf16",
    "no_half_vae": "scripts/test_precision.py::test_full_bf16",
    "use_8bit_adam": "library/training/test_optimizers.py::test_adamw8bit_runs_on_this_machine",
    "lr_scheduler_type": "scripts/test_optimizers_and_schedules.py::test_every_schedule_is_followed",
    "lr_scheduler_args": "scripts/test_optimizers_and_schedules.py::test_every_schedule_is_followed",
    "network_module": "scripts/test_adapters.py::test_it_trains_and_the_file_tells",
    "dim_from_weights": "networks/test_loading.py::test_ranks_from_the_file",
    "learning_rate_te": "scripts/test_train_db.py::test_a_resumed_run_equals_the_uninterrupted_one",
    "stop_text_encoder_training": "scripts/test_train_db.py::test_the_text_encoder_stops_at_its_step",
    "no_token_padding": "scripts/test_train_db.py::test_without_padding_the_unet_sees_the_caption_alone",
    "use_safetensors": "library/models/test_formats.py::*",
    "weights": f"{WORD}::test_a_file_is_gone_on_from",
    "init_word": f"{WORD}::test_the_first_loss_is_that_of_the_init_word",
}
"""Option to ``file::test``, or ``file::*`` where every test of the file is about it."""

HERE = {
    "vae_batch_size": test_vae_batch_size,
    "cache_latents": test_vae_batch_size,
    "highvram": test_highvram,
    "gradient_checkpointing": test_gradient_checkpointing,
    "fused_backward_pass": test_fused_backward_pass,
    "full_fp16": test_full_fp16,
    "skip_cache_check": test_skip_cache_check,
    "cache_info": test_cache_info,
    "max_data_loader_n_workers": test_max_data_loader_n_workers,
    "output_config": test_output_config,
}

ALWAYS: dict[str, str] = {
    "persistent_data_loader_workers": "workers stay for the whole run in any case",
    "skip_until_initial_step": "a run that begins later begins there in the data, too",
    "sdpa": "it is what is used unless another kind of attention is asked for",
}
"""What an option asks for that is so without it."""


ADDED: dict[str, str] = {
    **dict.fromkeys(
        ("timestep_distribution", "timestep_logit_mean", "timestep_logit_std", "timestep_snr_gamma"),
        LOSS,
    ),
    **dict.fromkeys(("ema", "ema_decay"), f"{EMA}::test_the_average_is_saved_beside_and_resumed"),
    **dict.fromkeys(
        ("ema_device", "ema_save"),
        "scripts/test_validation_and_ema.py::test_a_state_without_an_average_and_the_reverse",
    ),
    "ema_previews": f"{EMA}::test_previews_with_the_average",
    "cache_text_encoder_outputs": "scripts/test_train_network.py::test_captions_encoded_once_give_the_same_training",
    "channels_last": "scripts/test_precision.py::test_channels_last_changes_rounding_only",
    "tf32": f"{RUNTIME}::test_tf32_is_set_on_a_gpu_and_nowhere_else",
    **dict.fromkeys(("vae_slicing", "vae_tiling"), "library/models/test_latents.py::test_the_vae_works_in_parts"),
    "dry_run": "scripts/test_inspection.py::test_a_dry_run_shows_the_plan_without_anything_heavy",
    "validate_dataset": "scripts/test_inspection.py::test_validation_is_pure_json_with_an_exit_code",
    "no_report": "scripts/test_report.py::test_no_report",
    "no_manifest": "scripts/test_manifest.py::*",
    "on_nonfinite": "faults/test_nonfinite.py::*",
    "resume_allow_changes": "scripts/test_resuming.py::test_allowed_changes_hold_from_here_on",
    "save_state_every_minutes": "scripts/test_resuming.py::test_a_state_every_few_minutes",
}
"""Options that the reference does not have."""


def test_nothing_is_left_out() -> None:
    tables: list[Mapping[str, object]] = [BATCHES, SCREEN, RUNS, ELSEWHERE, HERE, ALWAYS]
    told = {name for table in tables for name in table} | {f"metadata_{name}" for name in CARD}
    reference = {name for names in REFERENCE.values() for name in names}
    assert reference == told
    declared = {name for script in SCRIPTS for name in declarations(OPTIONS[script])}
    assert declared - reference == ADDED.keys()


def test_scripts_share_what_they_have_in_common() -> None:
    """So what is shown for one script holds for the others."""
    kinds: dict[str, set[str]] = {}
    for script in SCRIPTS:
        for name, declared in declarations(OPTIONS[script]).items():
            kinds.setdefault(name, set()).add(declared.title)
    assert {name for name, titles in kinds.items() if len(titles) > 1} == {"learning_rate_te", "save_model_as"}


@pytest.mark.parametrize(("name", "place"), [*ELSEWHERE.items(), *ADDED.items()])
def test_the_named_test_is_there_and_about_it(name: str, place: str) -> None:
    file, _, function = place.partition("::")
    text = (TESTS / file).read_text(encoding="utf-8")
    assert name in text
    tests = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert function == "*" or function in tests
