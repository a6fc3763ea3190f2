"""``fine_tune.py`` end to end, on small random models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.files import read_tensors
from tests.scripts.first_batch import first_batch
from tests.scripts.runs import STEPS, Run, read_scalars, run_script, write_images
from tests.scripts.test_train_db import changed, loaded
from tests.tiny import Kind, tiny_sd

ASSETS = Path(__file__).parent / "losses"
FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}
IMAGES = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind, layers_per_block=1) for kind in FLAGS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def write_described(folder: Path, *, batch_size: int = 2, more: str = "") -> Path:
    """Write images, the metadata file that describes them, and the TOML that names both."""
    images = folder / "images"
    if not images.exists():
        write_images(images, IMAGES)
    entries = {f"{number:02d}": {"caption": "a thing", "tags": f"number {number}"} for number in range(IMAGES)}
    (folder / "metadata.json").write_text(json.dumps(entries), encoding="utf-8")
    config = folder / f"dataset-{batch_size}.toml"
    config.write_text(
        "[general]\nenable_bucket = true\n[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\n"
        f"batch_size = {batch_size}\n[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n"
        f"metadata_file = '{(folder / 'metadata.json').as_posix()}'\n{more}\n",
        encoding="utf-8",
    )
    return config


def arguments(model: Path, dataset: Path, *more: str, kind: Kind = "sd1", steps: int = STEPS) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--learning_rate=1e-3",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        *FLAGS[kind],
        *more,
    ]


def stored(kind: Kind) -> list[float]:
    return [float(line) for line in (ASSETS / f"fine_tune-{kind}.txt").read_text().split()]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others are compared with."""
    given = arguments(models["sd1"], write_described(data), "--save_model_as=safetensors")
    return run_script("fine_tune", tmp_path_factory.mktemp("plain"), *given)


def test_losses_are_the_stored_ones(plain: Run, models: dict[str, Path], data: Path) -> None:
    assert plain.code == 0
    assert plain.losses == pytest.approx(stored("sd1"), rel=1e-4)
    expected = first_batch(models["sd1"], data / "images")
    assert plain.losses[0] == pytest.approx(np.mean([example.loss for example in expected]), rel=1e-4)


@pytest.mark.parametrize("kind", ["sd2", "sd2_v"])
def test_losses_of_sd2_are_the_stored_ones(kind: Kind, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run = run_script("fine_tune", tmp_path, *arguments(models[kind], write_described(data), kind=kind))
    assert run.losses == pytest.approx(stored(kind), rel=1e-4)


def test_bf16_loses_nothing_of_the_model(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Frozen parts are in 16 bits while the run lasts, and are saved as the base model has them."""
    given = arguments(models["sd1"], write_described(data), "--mixed_precision=bf16", "--gradient_checkpointing")
    run = run_script("fine_tune", tmp_path, *given, "--save_model_as=safetensors", "--max_train_steps=2")
    assert run.losses == pytest.approx(stored("sd1")[:2], rel=0.05)
    tensors = read_tensors(run.folder / "last.safetensors").tensors
    dtypes = {
        prefix: {tensor.dtype for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("model.diffusion_model.", "cond_stage_model.")
    }
    assert dtypes == {"model.diffusion_model.": {torch.float32}, "cond_stage_model.": {torch.float32}}
    assert changed(loaded(models["sd1"]), loaded(run.folder / "last.safetensors")) == {"unet"}


def test_the_unet_alone_is_trained(plain: Run, models: dict[str, Path]) -> None:
    assert changed(loaded(models["sd1"]), loaded(plain.folder / "last.safetensors")) == {"unet"}


def test_the_text_encoder_is_trained_where_asked_for(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """And a run that is resumed after one step equals the uninterrupted one."""
    more = ("--train_text_encoder", "--learning_rate_te=1e-4", "--save_model_as=diffusers_safetensors")
    given = arguments(models["sd1"], write_described(data), *more, steps=3)
    whole = run_script("fine_tune", tmp_path / "whole", *given, "--save_state", "--save_every_n_steps=1")
    state = whole.folder / "at-step00000001-state"
    resumed = run_script("fine_tune", tmp_path / "resumed", *given, f"--resume={state}")
    weights = loaded(whole.folder / "last")
    assert changed(loaded(models["sd1"]), weights) == {"unet", "text_encoder"}
    assert resumed.losses == whole.losses[1:]
    assert not changed(weights, loaded(resumed.folder / "last"))
    assert read_scalars(whole.folder / "log", "lr/text_encoder1") == pytest.approx([1e-4] * 3)
    assert next((whole.folder / "log").glob("*/finetuning"))


def test_batch_and_accumulation_agree(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_described(data, batch_size=4), steps=2)
    whole = run_script("fine_tune", tmp_path / "4", *given)
    given = arguments(models["sd1"], write_described(data), "--gradient_accumulation_steps=2", steps=2)
    split = run_script("fine_tune", tmp_path / "2x2", *given)
    assert split.losses == pytest.approx(whole.losses, abs=1e-4)


def test_captions_encoded_once_train_the_same(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_described(data), "--cache_text_encoder_outputs", "--cache_latents", steps=2)
    run = run_script("fine_tune", tmp_path, *given)
    assert run.losses == pytest.approx(plain.losses[:2], rel=1e-4)


def test_v_pred_like_loss_is_honoured(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """As a velocity loss, 1 / alpha times that of the noise, is added: l (1 + s / alpha)."""
    given = arguments(models["sd1"], write_described(data), "--v_pred_like_loss=0.5", steps=1)
    run = run_script("fine_tune", tmp_path, *given)
    expected = [example.loss * (1 + 0.5 / example.alpha) for example in first_batch(models["sd1"], data / "images")]
    assert run.losses[0] == pytest.approx(np.mean(expected), rel=1e-4)


def test_masks_are_honoured(models: dict[str, Path], tmp_path: Path) -> None:
    """The right half of every image is transparent: it is shown as white, and its errors count nothing."""
    images = write_images(tmp_path / "images", IMAGES)
    opaque = write_images(tmp_path / "opaque", IMAGES)
    for path in images.glob("*.png"):
        pixels = np.array(Image.open(path))
        opacity = np.full((64, 64), 255, dtype=np.uint8)
        opacity[:, 32:] = 0
        Image.fromarray(np.dstack([pixels, opacity])).save(path)
        pixels[:, 32:] = 255
        Image.fromarray(pixels).save(opaque / path.name)
    dataset = write_described(tmp_path, more="alpha_mask = true")
    run = run_script("fine_tune", tmp_path / "out", *arguments(models["sd1"], dataset, steps=1))
    with_halves = [example.errors[:, :, :4].mean() / 2 for example in first_batch(models["sd1"], opaque)]
    assert run.losses[0] == pytest.approx(np.mean(with_halves), rel=1e-4)


WRONG = {
    "nothing trained": (["--learning_rate=0"], "nothing is trained"),
    "no padding": (["--no_token_padding"], "no_token_padding"),
    "network's option": (["--network_dim=4"], "network_dim"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_refused(given: list[str], message: str, models: dict[str, Path], data: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_script("fine_tune", data / "none", *arguments(models["sd1"], write_described(data)), *given)


def test_folders_without_metadata_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "1_shs thing", 2)
    given = [f"--pretrained_model_name_or_path={models['sd1']}", f"--train_data_dir={tmp_path / 'train'}"]
    with pytest.raises(UserError, match="no metadata file is given, and this method trains on nothing else"):
        run_script("fine_tune", tmp_path / "out", *given, "--resolution=64", "--caption_extension=.txt")


def test_regularisation_images_are_refused(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    described = write_described(data).read_text(encoding="utf-8")
    write_images(tmp_path / "reg", 2)
    both = tmp_path / "both.toml"
    reg = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'reg'}'\nis_reg = true\n"
    both.write_text(described + reg, encoding="utf-8")
    with pytest.raises(UserError, match="has no regularisation images"):
        run_script("fine_tune", tmp_path / "out", *arguments(models["sd1"], both))


def notices(*given: str) -> list[str]:
    from fine_tune import Options
    from library.options import parse_options

    told: list[str] = []
    parse_options(Options, given, prog="fine_tune.py", description="", announce=told.append)
    return told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--learning_rate_te=1e-5"], "without effect without --train_text_encoder: --learning_rate_te"),
        (["--diffusers_xformers", "--mem_eff_attn"], "without effect with --diffusers_xformers: --mem_eff_attn"),
        (
            ["--stop_text_encoder_training=5"],
            "stop_text_encoder_training (only train_db.py stops training the text encoder at a step)",
        ),
        (["--v2", "--clip_skip=2"], "--clip_skip 2 with --v2 is unusual"),
        (["--save_model_as=ckpt", "--use_safetensors"], "without effect with --save_model_as ckpt: --use_safetensors"),
    ],
)
def test_what_has_no_effect_is_told(given: list[str], message: str) -> None:
    assert any(message in text for text in notices(*given))


def test_diffusers_xformers_means_xformers() -> None:
    from library.full_model_options import FineTuningOptions
    from library.models.options import AttentionOptions

    asked = FineTuningOptions(diffusers_xformers=True).attention(AttentionOptions(mem_eff_attn=True))
    assert asked.xformers
    assert not asked.mem_eff_attn
    assert FineTuningOptions().attention(AttentionOptions(sdpa=True)) == AttentionOptions(sdpa=True)
