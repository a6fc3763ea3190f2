"""``train_network.py`` end to end, on small random models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from tests.scripts.runs import (
    STEPS,
    Run,
    read_losses,
    read_scalars,
    run_script,
    tensor_hash,
    write_dataset,
    write_images,
)
from tests.tiny import Kind, tiny_ldm, tiny_sd

ROOT = Path(__file__).parents[2]
ASSETS = Path(__file__).parent / "losses"
FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind, layers_per_block=1) for kind in FLAGS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def arguments(model: Path, dataset: Path, *more: str, kind: Kind = "sd1", steps: int = STEPS) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-2",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        *FLAGS[kind],
        *more,
    ]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others are compared with."""
    output = tmp_path_factory.mktemp("plain")
    return run_script("train_network", output, *arguments(models["sd1"], write_dataset(data)))


@pytest.mark.parametrize("kind", FLAGS)
def test_losses_are_the_stored_ones(kind: Kind, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run = run_script("train_network", tmp_path, *arguments(models[kind], write_dataset(data), kind=kind))
    stored = [float(line) for line in (ASSETS / f"train_network-{kind}.txt").read_text().split()]
    assert run.code == 0
    assert run.losses == pytest.approx(stored, rel=1e-4)


def test_the_first_loss_is_that_of_the_base_model(plain: Run, models: dict[str, Path], data: Path) -> None:
    """A fresh LoRA changes nothing: computed here with diffusers' own classes and the documented keys."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    from library.data.epoch_plan import EpochPlan, PlanBucket
    from library.randomness import torch_generator

    folder = models["sd1"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    plan = EpochPlan([PlanBucket(tuple(range(8)), 2)], 7, 1, 1)
    losses = []
    with torch.no_grad():
        for example in plan.epoch(1)[0].micro_batches[0].examples:

            def draw(purpose: str, number: int = example) -> torch.Tensor:
                return torch.randn(4, 8, 8, generator=torch_generator(7, purpose, 1, number))[None]

            pixels = np.asarray(Image.open(data / "images" / f"{example:02d}.png"), dtype=np.float32) / 127.5 - 1
            posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
            latents = (posterior.mean + posterior.std * draw("posterior")) * 0.18215
            timestep = torch.randint(0, 1000, (), generator=torch_generator(7, "timestep", 1, example))[None]
            noise = draw("noise")
            ids = tokenizer(f"a thing, number {example}", padding="max_length", max_length=77, return_tensors="pt")
            context = text_encoder(ids.input_ids).last_hidden_state
            found = unet(schedule.add_noise(latents, noise, timestep), timestep, context).sample
            losses.append(((found - noise) ** 2).mean().item())
    assert plain.losses[0] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_exact_set_of_files(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    output = tmp_path / "out"
    run = run_script(
        "train_network",
        output,
        *arguments(models["sd1"], write_dataset(data), steps=8),
        "--output_name=thing",
        "--save_every_n_steps=2",
        "--save_last_n_steps=2",
        "--save_every_n_epochs=1",
        "--save_state",
        "--sample_at_first",
        "--sample_every_n_epochs=1",
        f"--sample_prompts={prompts}",
    )
    models_and_states = {path.name for path in output.iterdir()} - {"log", "sample"}
    assert models_and_states == {
        "thing-step00000006.safetensors",
        "thing-step00000008.safetensors",
        "thing-step00000006-state",
        "thing-step00000008-state",
        "thing-000001.safetensors",
        "thing-000001-state",
        "thing.safetensors",
        "thing-state",
        "thing-report.html",
        "thing.run.json",
    }
    assert {path.name for path in (output / "thing-state").iterdir()} == {
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "train_state.json",
        "curves.json",
        "fingerprint.json",
        "manifest.json",
    }
    assert (output / "sample" / "thing_grid.png").exists()
    previews = sorted(path.name for path in (output / "sample").glob("thing_e*"))
    assert [name[:17] for name in previews] == [f"thing_e00000{epoch}_00_" for epoch in range(3)]
    assert all(name.endswith("_3.png") for name in previews)
    assert tensor_hash(output / "thing-step00000008.safetensors") == tensor_hash(output / "thing.safetensors")
    assert len(run.losses) == 8


def test_metadata_tells_the_run_and_no_path(plain: Run, models: dict[str, Path]) -> None:
    metadata = read_metadata(plain.folder / "last.safetensors")
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_num_train_images"] == "8"
    assert metadata["ss_steps"] == str(STEPS)
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(metadata["ss_tag_frequency"])
    text = json.dumps(metadata)
    assert str(models["sd1"].parent) not in text
    assert str(plain.folder.parent) not in text


def test_batch_and_accumulation_agree(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    whole = run_script("train_network", tmp_path / "4", *arguments(models["sd1"], write_dataset(data, batch_size=4)))
    split = run_script(
        "train_network",
        tmp_path / "2x2",
        *arguments(models["sd1"], write_dataset(data, batch_size=2), "--gradient_accumulation_steps=2"),
    )
    assert len(whole.losses) == STEPS
    assert split.losses == pytest.approx(whole.losses, abs=1e-4)


@pytest.mark.slow
def test_two_processes_agree_with_one(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    whole = run_script("train_network", tmp_path / "1", *arguments(models["sd1"], write_dataset(data, batch_size=4)))
    output = tmp_path / "2"
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=0",
            "--rdzv_backend=c10d",
        ),
        *("--rdzv_endpoint=localhost:0", str(ROOT / "train_network.py"), f"--output_dir={output}", "--seed=7"),
        *(f"--logging_dir={output / 'log'}", *arguments(models["sd1"], write_dataset(data, batch_size=2))),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert read_losses(output / "log") == pytest.approx(whole.losses, abs=1e-4)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(
    workers: int, plain: Run, models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a machine with fewer processors the number would be lowered.
    monkeypatch.setattr("library.data.loader.available_processors", lambda: 8)
    given = [f"--max_data_loader_n_workers={workers}"]
    run = run_script("train_network", tmp_path, *arguments(models["sd1"], write_dataset(data)), *given)
    assert run.tensor_hash() == plain.tensor_hash()


def test_the_same_seed_gives_the_same_tensors(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    again = run_script("train_network", tmp_path, *arguments(models["sd1"], write_dataset(data)))
    assert again.tensor_hash() == plain.tensor_hash()


def test_with_a_fixed_time_the_whole_file_is_the_same(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    given = arguments(models["sd1"], write_dataset(data), steps=1)
    files = [run_script("train_network", tmp_path / name, *given).folder / "last.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_previews_change_nothing(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2\n", encoding="utf-8")
    run = run_script(
        "train_network",
        tmp_path / "out",
        *arguments(models["sd1"], write_dataset(data)),
        "--sample_every_n_steps=1",
        "--sample_at_first",
        "--sample_sampler=euler_a",
        f"--sample_prompts={prompts}",
    )
    assert len(list((run.folder / "sample").glob("*_00_*.png"))) == STEPS + 1
    assert run.tensor_hash() == plain.tensor_hash()


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Lion", "SGDNesterov"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    optimizer: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch; with dropout, a schedule and a short last group."""
    given = arguments(
        models["sd1"],
        write_dataset(data, more="shuffle_caption = true\nflip_aug = true\ncaption_dropout_rate = 0.2"),
        f"--optimizer_type={optimizer}",
        "--lr_scheduler=cosine",
        "--network_dropout=0.1",
        "--gradient_accumulation_steps=3",
        steps=5,
    )
    whole = run_script("train_network", tmp_path / "whole", *given, "--save_state", "--save_every_n_steps=3")
    state = whole.folder / "at-step00000003-state"
    resumed = run_script("train_network", tmp_path / "resumed", *given, f"--resume={state}")
    assert resumed.losses == whole.losses[3:]
    assert resumed.tensor_hash() == whole.tensor_hash()


def test_a_resumed_run_takes_a_new_learning_rate(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--save_state", "--save_every_n_steps=2")
    whole = run_script("train_network", tmp_path / "whole", *given)
    state = whole.folder / "at-step00000002-state"
    more = (f"--resume={state}", "--resume_allow_changes", "--learning_rate=3e-3")
    run_script("train_network", tmp_path / "more", *given, *more)
    assert read_scalars(tmp_path / "more" / "log", "lr/unet") == pytest.approx([3e-3, 3e-3])


def test_a_state_of_another_network_is_refused(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from library.errors import UserError

    given = arguments(models["sd1"], write_dataset(data), steps=2)
    run_script("train_network", tmp_path / "a", *given, "--save_state", "--save_every_n_steps=1")
    state = tmp_path / "a" / "at-step00000001-state"
    more = ("--network_dim=8", "--resume_allow_changes", f"--resume={state}")
    with pytest.raises(UserError, match="does not fit what is trained"):
        run_script("train_network", tmp_path / "b", *given, *more)


def test_a_finished_run_is_not_resumed(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from library.errors import UserError

    given = arguments(models["sd1"], write_dataset(data), steps=1)
    run_script("train_network", tmp_path / "whole", *given, "--save_state")
    with pytest.raises(UserError, match="nothing is left to train"):
        run_script("train_network", tmp_path / "more", *given, f"--resume={tmp_path / 'whole' / 'last-state'}")


def test_bf16_and_checkpointing_train(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--mixed_precision=bf16", "--save_precision=bf16")
    run = run_script("train_network", tmp_path, *given, "--gradient_checkpointing", "--cache_latents")
    assert run.losses == pytest.approx(plain.losses, rel=0.05)
    tensors = read_tensors(run.folder / "last.safetensors").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_checkpointing_and_caching_change_nothing(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--gradient_checkpointing", "--cache_latents")
    run = run_script("train_network", tmp_path, *given)
    assert run.losses == pytest.approx(plain.losses, rel=1e-4)


def test_fp16_without_a_gpu_is_refused(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine can train fp16")
    from library.errors import UserError

    given = arguments(models["sd1"], write_dataset(data), "--mixed_precision=fp16")
    with pytest.raises(UserError, match="bf16") as refusal:
        run_script("train_network", tmp_path, *given)
    assert "--mixed_precision=bf16" in str(refusal.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_trains_like_the_folder(suffix: str, plain: Run, data: Path, tmp_path: Path) -> None:
    model = tiny_ldm(tmp_path, "sd1", suffix, layers_per_block=1)
    run = run_script("train_network", tmp_path / "out", *arguments(model, write_dataset(data)))
    assert run.losses == pytest.approx(plain.losses, rel=1e-4)


def test_diffusers_shows_what_our_preview_shows(plain: Run, models: dict[str, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    from library.models.options import ModelOptions, PromptOptions
    from library.models.stable_diffusion import load_stable_diffusion
    from networks.lora import create_network_from_weights

    ours = load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(models["sd1"])), PromptOptions())
    file = str(plain.folder / "last.safetensors")
    network, _ = create_network_from_weights(1.0, file, ours.vae, ours.text_encoder, ours.unet)
    base = ours.unet(torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 77, 64)).sample
    network.apply_to(ours.text_encoder, ours.unet)
    network.load_weights(file)
    theirs = StableDiffusionPipeline.from_pretrained(models["sd1"], safety_checker=None, local_files_only=True)
    theirs.load_lora_weights(file)
    ids = theirs.tokenizer("a thing", padding="max_length", max_length=77, return_tensors="pt").input_ids
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = []
        for unet, text_encoder in ((ours.unet, ours.text_encoder), (theirs.unet, theirs.text_encoder)):
            seen.append(unet(noisy, torch.tensor([500]), text_encoder(ids).last_hidden_state).sample)
        changed = ours.unet(torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 77, 64)).sample
    assert (changed - base).abs().max() > 1e-3
    assert (seen[0] - seen[1]).abs().max() < 1e-3


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_lycoris_trains(algorithm: str, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data))
    given[given.index("--network_module=networks.lora")] = "--network_module=lycoris.kohya"
    given += ["--network_args", f"algo={algorithm}", "conv_dim=2"]
    run = run_script("train_network", tmp_path, *given)
    tensors = read_tensors(run.folder / "last.safetensors").tensors
    assert len(run.losses) == STEPS
    assert any("lora_te_text_model_" in name for name in tensors)
    assert any(name.startswith("lora_unet_") for name in tensors)


def test_folders_and_regularisation_images(models: dict[str, Path], tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "2_shs thing", 3)
    write_images(tmp_path / "reg" / "1_thing", 4, seed=1)
    run = run_script(
        "train_network",
        tmp_path / "out",
        f"--pretrained_model_name_or_path={models['sd1']}",
        f"--train_data_dir={tmp_path / 'train'}",
        f"--reg_data_dir={tmp_path / 'reg'}",
        "--resolution=64",
        "--caption_extension=.txt",
        "--network_module=networks.lora",
        "--max_train_epochs=2",
        "--train_batch_size=4",
        "--max_data_loader_n_workers=0",
    )
    # 3 images x 2, and as many regularisation images: 12 examples, 3 batches of 4.
    assert len(run.losses) == 2 * 3
    metadata = read_metadata(run.folder / "last.safetensors")
    assert metadata["ss_num_train_images"] == "6"


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_cleanly(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "train_network.py"), f"--output_dir={output}", "--seed=7", "--save_state"]
    given = arguments(models["sd1"], write_dataset(data), steps=100_000)
    shown = tmp_path / "shown.txt"
    with shown.open("w") as stream:
        process = subprocess.Popen([*command, *given], cwd=ROOT, stderr=stream)
    patience = time.monotonic() + 120
    while " 3/100000" not in shown.read_text() and time.monotonic() < patience:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    saved = sorted(path.name for path in output.iterdir())
    assert len(saved) == 4
    assert saved[0].startswith("at-step")
    assert saved[1].endswith(".safetensors") or saved[0].endswith("-state")
    assert saved[2:] == ["report.html", "run.json"]
    assert 'class="outcome stopped"' in (output / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert manifest["outcome"] == "stopped"
    assert {*manifest["results"], *manifest["states"]} == {*saved[:2]}


def test_captions_encoded_once_give_the_same_training(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    unet_only = [*arguments(models["sd1"], write_dataset(data)), "--network_train_unet_only"]
    live = run_script("train_network", tmp_path / "live", *unet_only)
    cached = run_script("train_network", tmp_path / "cached", *unet_only, "--cache_text_encoder_outputs")
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)


def test_changing_captions_are_not_encoded_once(models: dict[str, Path], tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, more="shuffle_caption = true")
    once = ["--network_train_unet_only", "--cache_text_encoder_outputs"]
    with pytest.raises(UserError, match=r"change from use to use \(shuffle_caption\)"):
        run_script("train_network", tmp_path / "out", *arguments(models["sd1"], dataset), *once)


def test_bf16_weights_and_steps_within_the_backward_pass(
    models: dict[str, Path], data: Path, tmp_path: Path, plain: Run
) -> None:
    narrow = [*arguments(models["sd1"], write_dataset(data)), "--mixed_precision=bf16", "--full_bf16"]
    whole = run_script("train_network", tmp_path / "whole", *narrow, "--max_grad_norm=0")
    fused = run_script("train_network", tmp_path / "fused", *narrow, "--max_grad_norm=0", "--fused_backward_pass")
    assert whole.losses == pytest.approx(plain.losses, rel=0.05)
    one, other = (read_tensors(run.folder / "last.safetensors").tensors for run in (whole, fused))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
        assert name.endswith(".alpha") or tensor.dtype == torch.bfloat16
