"""Mistakes: each has one message that says what, where and what to do, exit code 2, and comes before any training."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from tests.scripts.runs import run_script, write_dataset, write_images
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "cv2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd2", "sd2", layers_per_block=1)


def refusal(tmp_path: Path, model: Path, dataset: Path, *more: str) -> str:
    """What a run with these arguments says when it is refused; nothing may be written."""
    output = tmp_path / "out"
    given = [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--network_module=networks.lora",
        "--max_train_steps=1",
        "--max_data_loader_n_workers=0",
    ]
    with pytest.raises(UserError) as error:
        run_script("train_network", output, *given, *more)
    assert not output.exists()
    for problem in error.value.problems:
        assert problem.where, problem
        assert problem.remedy, problem
    return str(error.value)


def empty_folder(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        path.unlink()


def missing_folder(folder: Path) -> None:
    (folder / "images").rename(folder / "imagess")


def one_level_too_low(folder: Path) -> None:
    (folder / "inner").mkdir()
    for path in (folder / "images").iterdir():
        path.rename(folder / "inner" / path.name)
    (folder / "inner").rename(folder / "images" / "inner")


def unreadable_image(folder: Path) -> None:
    (folder / "images" / "03.png").write_bytes(b"not an image")


def truncated_image(folder: Path) -> None:
    path = folder / "images" / "03.png"
    path.write_bytes(path.read_bytes()[:-100])


def truncated_jpeg(folder: Path) -> None:
    path = folder / "images" / "99.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-50])


def caption_not_utf8(folder: Path) -> None:
    (folder / "images" / "03.txt").write_bytes("caffè".encode("cp1252"))


def captions_of_another_extension(folder: Path) -> None:
    for path in (folder / "images").glob("*.txt"):
        path.rename(path.with_suffix(".cap"))


def repeats_of_zero(folder: Path) -> None:
    path = folder / "dataset-2.toml"
    path.write_text(path.read_text().replace("num_repeats = 1", "num_repeats = 0"))


def misspelt_key(folder: Path) -> None:
    path = folder / "dataset-2.toml"
    path.write_text(path.read_text().replace("num_repeats = 1", "num_repeat = 1"))


def wrong_type(folder: Path) -> None:
    path = folder / "dataset-2.toml"
    path.write_text(path.read_text().replace("batch_size = 2", "batch_size = 'two'"))


def resolution_without_buckets(folder: Path) -> None:
    path = folder / "dataset-2.toml"
    path.write_text(path.read_text().replace("min_bucket_reso = 64", "min_bucket_reso = 512"))


def broken_toml(folder: Path) -> None:
    path = folder / "dataset-2.toml"
    path.write_text(path.read_text().replace("[[datasets]]", "[[datasets]"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (empty_folder, ["images", "no image"]),
        (missing_folder, ["images", "imagess"]),
        (one_level_too_low, ["inner", "image_dir"]),
        (unreadable_image, ["03.png"]),
        (truncated_image, ["03.png"]),
        (truncated_jpeg, ["99.jpg"]),
        (caption_not_utf8, ["03.txt", "UTF-8"]),
        (captions_of_another_extension, [".cap", "caption_extension"]),
        (repeats_of_zero, ["num_repeats", "0"]),
        (misspelt_key, ["num_repeat", "num_repeats", "dataset-2.toml:1"]),
        (wrong_type, ["batch_size", "two"]),
        (resolution_without_buckets, ["512", "64"]),
        (broken_toml, ["dataset-2.toml"]),
    ],
)
def test_a_spoilt_data_set(spoil: Callable[[Path], None], words: list[str], model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    spoil(tmp_path / "data")
    message = refusal(tmp_path, model, dataset)
    for word in words:
        assert word in message


def test_images_one_level_too_high(model: Path, tmp_path: Path) -> None:
    """``--train_data_dir`` names the parent of the image folders."""
    images = write_images(tmp_path / "5_shs thing", 2)
    with pytest.raises(UserError) as error:
        run_script(
            "train_network",
            tmp_path / "out",
            f"--pretrained_model_name_or_path={model}",
            f"--train_data_dir={images}",
            "--resolution=64",
            "--network_module=networks.lora",
        )
    assert str(tmp_path) in str(error.value)


def test_a_model_that_is_not_there(model: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, model.with_name("sd0"), write_dataset(tmp_path / "data"))
    assert "sd0" in message
    assert "sd1" in message


def test_a_file_of_another_kind(model: Path, tmp_path: Path) -> None:
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    assert "VAE" in refusal(tmp_path, vae, write_dataset(tmp_path / "data"))


def test_sd2_without_its_flag(sd2: Path, tmp_path: Path) -> None:
    assert "--v2" in refusal(tmp_path, sd2, write_dataset(tmp_path / "data"))


def test_sd1_with_the_flag_of_sd2(model: Path, tmp_path: Path) -> None:
    assert "--v2" in refusal(tmp_path, model, write_dataset(tmp_path / "data"), "--v2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rte=1"], ["--learning_rte", "--learning_rate"]),
        (["--max_train_steps=lots"], ["--max_train_steps", "lots"]),
        (["--lr_scheduler=cosign"], ["cosign", "cosine"]),
        (["--v_pred_like_loss=0.1", "--v_parameterization"], ["--v_pred_like_loss"]),
        (["--adaptive_noise_scale=0.1"], ["--adaptive_noise_scale", "--noise_offset"]),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], ["--network_train_unet_only"]),
        (["--optimizer_args", "weight_decai=0.1"], ["weight_decai", "weight_decay"]),
        (["--network_args", "conv_dims=4"], ["conv_dims", "conv_dim"]),
        (["--optimizer_type=Prodgy"], ["Prodgy", "Did you mean Prodigy?"]),
        (["--resume=nowhere"], ["nowhere"]),
        (["--network_weights=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--lr_warmup_steps=10"], ["constant_with_warmup"]),
    ],
)
def test_options(arguments: list[str], words: list[str], model: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, model, write_dataset(tmp_path / "data"), *arguments)
    for word in words:
        assert word in message


def test_everything_wrong_is_told_at_once(model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    unreadable_image(tmp_path / "data")
    caption_not_utf8(tmp_path / "data")
    message = refusal(
        tmp_path,
        model.with_name("sd0"),
        dataset,
        *("--optimizer_args", "weight_decai=0.1"),
        *("--network_args", "conv_dims=4"),
    )
    for word in ("sd0", "03.png", "03.txt", "weight_decai", "conv_dims"):
        assert word in message


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a report of the heavy modules it imported."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY} if name in sys.modules]))\n"
        "sys.argv[0] = 'train_network.py'\n"
        "import train_network\n"
        "from library.errors import run_script\n"
        "run_script(train_network.main)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_help_imports_nothing_heavy() -> None:
    done = in_a_process("--help")
    assert done.returncode == 0
    assert "HEAVY []" in done.stdout
    assert "--network_module" in done.stdout
    assert "[default: 1600]" in done.stdout


def test_a_mistake_imports_nothing_heavy_and_ends_with_2(model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    unreadable_image(tmp_path)
    done = in_a_process(
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--network_module=networks.lora",
        f"--output_dir={tmp_path / 'out'}",
    )
    assert done.returncode == 2
    assert "HEAVY []" in done.stdout
    assert "03.png" in done.stderr
    assert "Traceback" not in done.stderr
