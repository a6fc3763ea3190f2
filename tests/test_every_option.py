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
MASKS = f"{FOLDERS} --masked_loss"

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
    "train_batch_size": Change("--train_batch_size=2"),
    "alpha_mask": Change("--alpha_mask", MASKS),
    "masked_loss": Change("--masked_loss", "--alpha_mask"),
    "conditioning_data_dir": Change("--conditioning_data_dir={}/masks", MASKS),
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
