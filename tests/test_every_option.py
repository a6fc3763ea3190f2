"""Every option of the reference's training scripts, for Stable Diffusion 1 and 2, is exercised: no option is only taken.

Three kinds of proof, each of which fails if an option is ignored:

- here, the batches that a script would train on differ with the option (``BATCHES``);
- here, what ``--dry_run`` prints differs with it (``SCREEN``), or a model card does (``CARD``);
- elsewhere, a test that is named (``ELSEWHERE``).

Options that are refused are listed with the reason; everything else in the reference's lists must be in one table.
"""

import ast
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.dataset import TrainingDataset
from library.data.setup import prepare_data
from library.errors import UserError
from library.inputs import read_data
from library.option_fields import declarations
from library.options import parse_options
from library.training.metadata import ModelFacts, modelspec
from tests.library.data.small_set import tokenize
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
        entries = {f"{stem}.png": {"caption": f"{name} {stem}"} for stem in list(sizes)[number:]}
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
    assert isinstance(after[0], tuple) == (name != "dataset_class"), after


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
    "use_lion_optimizer": Change("--use_lion_optimizer", "--optimizer_args amsgrad=True"),
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
    "use_safetensors": Change("--use_safetensors", "--save_model_as=diffusers"),
    "sample_every_n_steps": Change("--sample_every_n_steps=3", PREVIEWS),
    "sample_every_n_epochs": Change("--sample_every_n_epochs=1", f"{EPOCHS} {PREVIEWS}"),
    "sample_at_first": Change("--sample_at_first", PREVIEWS),
    "sample_prompts": Change("--sample_prompts={}/others.txt", PREVIEWS),
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
    "skip_until_initial_step": Change("--skip_until_initial_step"),
    "initial_epoch": Change("--initial_epoch=2"),
    "initial_step": Change("--initial_step=2"),
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
    "console_log_file": Change("--console_log_file={}/log.txt", "--lowram"),
}
"""What the plan, a notice or a refusal shows: of options of the right value the plan, as far as it is short."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    for name, lines in (("prompts", 1), ("others", 2)):
        (images / f"{name}.txt").write_text("a thing\n" * lines, encoding="utf-8")
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", layers_per_block=1)


def screen(script: str, words: str, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a dry run prints on both streams, or what it refuses."""
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
        return f"refused: {error}"
    shown = capsys.readouterr()
    return f"{shown.out}\n{shown.err}"


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for name in SCREEN for script in having(name)], ids=lambda value: value
)
def test_the_screen_differs(
    script: str, name: str, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = SCREEN[name]
    seen = []
    for words in (change.context, f"{change.context} {change.option}"):
        shown = screen(script, words, model, images, capsys)
        # Times of log lines, and that a flag is given twice, say nothing about what it does.
        lines = (line.partition(" WARNING ")[2] or line for line in shown.splitlines())
        seen.append([line for line in lines if "given more than once" not in line])
    assert not seen[0][0].startswith("refused"), seen[0]
    assert seen[0] != seen[1]
