"""Validation and the average of the weights in whole runs of ``train_network.py``, on small random models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from library.files import read_metadata, read_tensors
from tests.scripts.runs import Run, read_scalars, run_script, tensor_hash, write_dataset, write_images
from tests.scripts.test_train_network import arguments
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]
TIMESTEPS = (200, 400, 600, 800)
SPLIT = ["--validation_split=0.25", "--validation_seed=3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of 3 steps on 6 of 8 images, validated on the others after every step."""
    given = arguments(model, write_dataset(data), *SPLIT, "--validate_every_n_steps=1", steps=6)
    return run_script("train_network", tmp_path_factory.mktemp("plain"), *given)


def scalars(run: Run, tag: str) -> list[float]:
    return read_scalars(run.folder / "log", tag)


def held_out_numbers(count: int = 8, part: float = 0.25, seed: int = 3) -> list[int]:
    """Which images are held out: those whose documented key is smallest."""
    from library.randomness import key

    ranked = sorted(range(count), key=lambda number: key(seed, "validation split", f"{number:02d}.png"))
    return sorted(ranked[: round(count * part)])


def independent_losses(model: Path, images: Path) -> dict[int, float]:
    """The validation losses of the base model, with diffusers' own classes and the documented keys."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    from library.randomness import key, torch_generator

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    losses: dict[int, list[float]] = {timestep: [] for timestep in TIMESTEPS}
    for number in held_out_numbers():
        address = key("image", f"{number:02d}.png")

        def draw(purpose: str, timestep: int, address: int = address) -> torch.Tensor:
            return torch.randn(4, 8, 8, generator=torch_generator(3, purpose, timestep, address))[None]

        pixels = np.asarray(Image.open(images / f"{number:02d}.png"), dtype=np.float32) / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
            latents = (posterior.mean + posterior.std * draw("posterior", 0)) * 0.18215
            ids = tokenizer(f"a thing, number {number}", padding="max_length", max_length=77, return_tensors="pt")
            context = text_encoder(ids.input_ids).last_hidden_state
            for timestep in TIMESTEPS:
                noise, at = draw("noise", timestep), torch.tensor([timestep])
                found = unet(schedule.add_noise(latents, noise, at), at, context).sample
                losses[timestep].append(((found - noise) ** 2).mean().item())
    return {timestep: float(np.mean(found)) for timestep, found in losses.items()}


def test_the_figure_is_that_of_diffusers(model: Path, data: Path, tmp_path: Path) -> None:
    """The learning rate is next to 0; noise options and loss weights do not reach validation."""
    given = arguments(model, write_dataset(data), *SPLIT, steps=1)
    more = ["--learning_rate=1e-12", "--noise_offset=0.1", "--multires_noise_iterations=3", "--min_snr_gamma=1"]
    run = run_script("train_network", tmp_path, *given, *more, "--shuffle_caption", "--caption_dropout_rate=0.9")
    expected = independent_losses(model, data / "images")
    for timestep, loss in expected.items():
        assert scalars(run, f"loss/validation/t{timestep}") == [pytest.approx(loss, rel=1e-4)]
    mean = np.mean(list(expected.values()))
    assert scalars(run, "loss/validation/step_average") == [pytest.approx(mean, rel=1e-4)]
    assert scalars(run, "loss/validation/step_divergence") == [pytest.approx(mean - run.losses[0], rel=1e-3, abs=1e-5)]


def test_figures_of_steps_and_epochs(plain: Run) -> None:
    steps = scalars(plain, "loss/validation/step_average")
    assert len(steps) == 6
    assert len(set(steps)) == 6
    assert scalars(plain, "loss/validation/epoch_average") == [steps[2], steps[5]]
    assert len(scalars(plain, "loss/validation/epoch_divergence")) == 2
    metadata = read_metadata(plain.folder / "last.safetensors")
    assert metadata["ss_num_train_images"] == "6"
    assert metadata["ss_num_validation_images"] == "2"
    assert (metadata["ss_validation_split"], metadata["ss_validation_seed"]) == ("0.25", "3")
    mark = json.loads((plain.folder / "best.json").read_text())
    assert mark == {"file": "last.safetensors", "step": 6, "loss": pytest.approx(steps[5]), "outlived": False}


def test_validation_changes_nothing_of_the_training(plain: Run, model: Path, data: Path, tmp_path: Path) -> None:
    seldom = arguments(model, write_dataset(data), *SPLIT, "--validate_every_n_epochs=9", "--cache_latents", steps=6)
    run = run_script("train_network", tmp_path / "seldom", *seldom)
    assert run.losses == pytest.approx(plain.losses, rel=1e-4)
    # The last model is validated in any case; latents from the cache are those of the images.
    last = scalars(plain, "loss/validation/step_average")[-1]
    assert scalars(run, "loss/validation/step_average") == [pytest.approx(last, rel=1e-3)]

    config = write_dataset(tmp_path / "rest")
    for number in held_out_numbers():
        (tmp_path / "rest" / "images" / f"{number:02d}.png").unlink()
    without = run_script("train_network", tmp_path / "without", *arguments(model, config, steps=6))
    assert without.tensor_hash() == plain.tensor_hash()
    assert not (without.folder / "best.json").exists()


def test_a_limited_validation_and_a_data_set_of_its_own(model: Path, data: Path, tmp_path: Path) -> None:
    config = write_dataset(data)
    write_images(tmp_path / "held", 3, seed=9)
    both = tmp_path / "both.toml"
    both.write_text(
        config.read_text()
        + "\n[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\nvalidation_split = 1.0\n"
        + f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'held').as_posix()}'\n"
    )
    whole = run_script("train_network", tmp_path / "a", *arguments(model, both, steps=1))
    part = run_script("train_network", tmp_path / "b", *arguments(model, both, "--max_validation_steps=1", steps=1))
    assert read_metadata(whole.folder / "last.safetensors")["ss_num_validation_images"] == "3"
    assert whole.losses == part.losses
    assert scalars(whole, "loss/validation/t200") != scalars(part, "loss/validation/t200")


def test_a_run_without_training_images_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    from library.errors import UserError

    with pytest.raises(UserError, match="leaves no image to train on"):
        run_script("train_network", tmp_path, *arguments(model, write_dataset(data), "--validation_split=1"))


@pytest.mark.slow
def test_two_processes_agree_with_one(model: Path, data: Path, tmp_path: Path) -> None:
    more = [*SPLIT, "--validation_split=0.4", "--ema"]
    whole = run_script("train_network", tmp_path / "1", *arguments(model, write_dataset(data, batch_size=2), *more))
    output = tmp_path / "2"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / "train_network.py")),
        *(f"--output_dir={output}", "--seed=7", f"--logging_dir={output / 'log'}"),
        *arguments(model, write_dataset(data, batch_size=1), *more),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    for tag in (*(f"validation/t{timestep}" for timestep in TIMESTEPS), "validation_ema/step_average"):
        assert read_scalars(output / "log", f"loss/{tag}") == pytest.approx(scalars(whole, f"loss/{tag}"), abs=1e-4)
    averages = [read_tensors(folder / "last-ema.safetensors").tensors for folder in (output, whole.folder)]
    for name, tensor in averages[0].items():
        # Adam divides by the size of a gradient: of one that is nearly 0, rounding decides.
        assert (tensor - averages[1][name]).abs().mean() < 1e-4


def test_the_average_is_saved_beside_and_resumed(model: Path, data: Path, tmp_path: Path) -> None:
    given = arguments(model, write_dataset(data), "--ema", "--ema_decay=0.15", "--network_dropout=0.1", steps=6)
    saving = ["--save_every_n_steps=1", "--save_last_n_steps=3", "--output_name=thing"]
    whole = run_script("train_network", tmp_path / "whole", *given, *saving, "--save_state")
    stems = [f"thing-step{step:08d}{ema}.safetensors" for step in (3, 4, 5, 6) for ema in ("", "-ema")]
    models = {path.name for path in whole.folder.iterdir() if path.suffix == ".safetensors"}
    assert models == {*stems, "thing.safetensors", "thing-ema.safetensors"}
    state = whole.folder / "thing-step00000003-state"
    assert "ema.safetensors" in json.loads((state / "manifest.json").read_text())["files"]

    # After n updates, min(0.15, (1 + n) / (10 + n)) of the average stays.
    files = [read_tensors(whole.folder / name).tensors for name in (stems[1], stems[2], stems[3])]
    for name, before in files[0].items():
        expected = 0.15 * before + 0.85 * files[1][name]
        assert torch.allclose(files[2][name], expected, atol=1e-6)
    assert read_metadata(whole.folder / "thing-ema.safetensors")["ss_ema_decay"] == "0.15"
    assert "ss_ema_decay" not in read_metadata(whole.folder / "thing.safetensors")

    resumed = run_script("train_network", tmp_path / "resumed", *given, "--output_name=thing", f"--resume={state}")
    for name in ("thing.safetensors", "thing-ema.safetensors"):
        assert resumed.tensor_hash(name) == whole.tensor_hash(name)
    without = run_script("train_network", tmp_path / "without", *[word for word in given if "--ema" not in word])
    assert without.tensor_hash() == whole.tensor_hash("thing.safetensors")


def test_a_state_without_an_average_and_the_reverse(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(model, write_dataset(data), steps=2)
    saving = ["--save_every_n_steps=1", "--save_state"]
    run_script("train_network", tmp_path / "a", *given, *saving)
    state = tmp_path / "a" / "at-step00000001-state"
    only = ["--ema", "--ema_save=ema", "--ema_device=cpu"]
    run = run_script("train_network", tmp_path / "b", *given, *only, *saving, f"--resume={state}")
    assert {path.name for path in run.folder.glob("*.safetensors")} == {
        "at-step00000002-ema.safetensors",
        "last-ema.safetensors",
    }
    assert "it begins with the weights of the state" in capsys.readouterr().err
    weights = [read_tensors(state / "model.safetensors").tensors, read_tensors(tmp_path / "a" / "last.safetensors")]
    averages = read_tensors(run.folder / "last-state" / "ema.safetensors").tensors
    final = read_tensors(run.folder / "last-state" / "model.safetensors").tensors
    assert len(weights[1].tensors) == len(final)
    for name, tensor in averages.items():
        assert torch.allclose(tensor, 0.1 * weights[0][name] + 0.9 * final[name], atol=1e-6)
    longer = arguments(model, write_dataset(data), steps=3)
    run_script("train_network", tmp_path / "c", *longer, f"--resume={run.folder / 'last-state'}")
    assert "is not continued: --ema is not given" in capsys.readouterr().err


def test_previews_with_the_average(model: Path, data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    given = arguments(model, write_dataset(data), "--ema", "--sample_every_n_steps=2", steps=2)
    given.append(f"--sample_prompts={prompts}")
    shown = {}
    for name, more in {"weights": [], "average": ["--ema_previews"]}.items():
        run = run_script("train_network", tmp_path / name, *given, *more)
        (picture,) = (run.folder / "sample").iterdir()
        shown[name] = picture.read_bytes()
    assert shown["weights"] != shown["average"]
    assert tensor_hash(tmp_path / "weights" / "last.safetensors") == tensor_hash(
        tmp_path / "average" / "last.safetensors"
    )


def test_the_plan_tells_of_both(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(model, write_dataset(data), *SPLIT, "--ema", "--dry_run", "--validate_every_n_steps=5")
    run_script("train_network", tmp_path, *given)
    shown = capsys.readouterr().out
    assert "num validation images * repeats: 2" in shown
    assert "validation: images held out: 2 (images 2)" in shown
    assert "after every epoch, after every 5 steps, and of every saved model" in shown
    assert "average of the weights (EMA): decay 0.9999, kept on the device" in shown
    assert "averages: last-ema.safetensors (1 saved)" in shown


def method_arguments(script: str, model: Path, folder: Path) -> list[str]:
    """A short run of ``script`` on two validated of eight images."""
    from tests.scripts import test_fine_tune, test_textual_inversion, test_train_db

    if script == "train_db":
        given = test_train_db.arguments(model, write_dataset(folder), steps=3)
    elif script == "fine_tune":
        given = test_fine_tune.arguments(model, test_fine_tune.write_described(folder), steps=3)
    else:
        config = test_textual_inversion.dataset(folder)
        given = test_textual_inversion.arguments(model, config, "--use_object_template", steps=3)
    return [*given, *SPLIT, "--ema", "--output_name=thing", "--save_model_as=safetensors"]


@pytest.mark.parametrize("script", ["train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI"])
def test_every_method_validates_averages_and_resumes(script: str, tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "sd1", "sd1")
    given = method_arguments(script, model, tmp_path)
    saving = ["--save_every_n_steps=2", "--save_state", "--validate_every_n_steps=1"]
    whole = run_script(script, tmp_path / "whole", *given, *saving)
    found = [scalars(whole, f"loss/{tag}/step_average") for tag in ("validation", "validation_ema")]
    assert [len(figures) for figures in found] == [3, 3]
    assert all(one != other for one, other in zip(*found, strict=True))
    state = whole.folder / "thing-step00000002-state"
    resumed = run_script(script, tmp_path / "resumed", *given, f"--resume={state}")
    for name in ("thing.safetensors", "thing-ema.safetensors"):
        assert resumed.tensor_hash(name) == whole.tensor_hash(name)
    assert whole.tensor_hash("thing.safetensors") != whole.tensor_hash("thing-ema.safetensors")
    last = (scalars(resumed, f"loss/{tag}/step_average") for tag in ("validation", "validation_ema"))
    assert [figures[-1] for figures in found] == [figures[-1] for figures in last]


def test_other_networks_and_encoded_captions(model: Path, data: Path, tmp_path: Path) -> None:
    given = arguments(model, write_dataset(data), *SPLIT, "--ema", steps=2)
    given[given.index("--network_module=networks.lora")] = "--network_module=lycoris.kohya"
    foreign = run_script("train_network", tmp_path / "a", *given, "--network_args", "algo=loha")
    assert (foreign.folder / "last-ema.safetensors").exists()
    given = arguments(model, write_dataset(data), *SPLIT, "--network_train_unet_only", steps=1)
    live = run_script("train_network", tmp_path / "b", *given)
    encoded = run_script("train_network", tmp_path / "c", *given, "--cache_text_encoder_outputs", "--cache_latents")
    tag = "loss/validation/step_average"
    assert scalars(encoded, tag) == [pytest.approx(scalars(live, tag)[0], rel=1e-4)]
