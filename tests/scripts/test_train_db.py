"""``train_db.py`` end to end, on small random models."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from tests.scripts.first_batch import first_batch
from tests.scripts.runs import STEPS, Run, read_losses, read_scalars, run_script, write_dataset, write_images
from tests.tiny import Kind, tiny_ldm, tiny_sd

ROOT = Path(__file__).parents[2]
ASSETS = Path(__file__).parent / "losses"
FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}
PARTS = ("unet", "text_encoder", "vae")


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
        "--learning_rate=1e-3",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        *FLAGS[kind],
        *more,
    ]


def loaded(path: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Every weight of a model, as this program loads it."""
    from library.models.options import ModelOptions, PromptOptions
    from library.models.stable_diffusion import load_stable_diffusion

    options = ModelOptions(pretrained_model_name_or_path=str(path), v2="--v2" in flags)
    model = load_stable_diffusion(options, PromptOptions())
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(model, part).state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts of a model that differ."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others are compared with."""
    output = tmp_path_factory.mktemp("plain")
    given = arguments(models["sd1"], write_dataset(data), "--save_model_as=safetensors")
    return run_script("train_db", output, *given)


def stored(kind: Kind) -> list[float]:
    return [float(line) for line in (ASSETS / f"train_db-{kind}.txt").read_text().split()]


def test_losses_are_the_stored_ones(plain: Run) -> None:
    assert plain.code == 0
    assert plain.losses == pytest.approx(stored("sd1"), rel=1e-4)


@pytest.mark.parametrize("kind", ["sd2", "sd2_v"])
def test_losses_of_sd2_are_the_stored_ones(kind: Kind, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run = run_script("train_db", tmp_path, *arguments(models[kind], write_dataset(data), kind=kind))
    assert run.losses == pytest.approx(stored(kind), rel=1e-4)
    expected = first_batch(models[kind], data / "images", velocity=kind == "sd2_v")
    assert run.losses[0] == pytest.approx(np.mean([example.loss for example in expected]), rel=1e-4)


def test_the_first_loss_is_that_of_the_base_model(plain: Run, models: dict[str, Path], data: Path) -> None:
    expected = first_batch(models["sd1"], data / "images")
    assert plain.losses[0] == pytest.approx(np.mean([example.loss for example in expected]), rel=1e-4)


def test_unet_and_text_encoder_are_trained_and_the_vae_is_not(plain: Run, models: dict[str, Path]) -> None:
    before, after = loaded(models["sd1"]), loaded(plain.folder / "last.safetensors")
    assert changed(before, after) == {"unet", "text_encoder"}
    assert {tensor.dtype for name, tensor in after.items() if "position_ids" not in name} == {torch.float32}


def test_bf16_and_checkpointing_train(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--mixed_precision=bf16", "--save_precision=bf16", steps=2)
    more = ["--gradient_checkpointing", "--cache_latents", "--save_model_as=safetensors"]
    run = run_script("train_db", tmp_path, *given, *more)
    assert run.losses == pytest.approx(stored("sd1")[:2], rel=0.05)
    tensors = read_tensors(run.folder / "last.safetensors").tensors
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_checkpointing_changes_nothing(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--gradient_checkpointing", steps=2)
    run = run_script("train_db", tmp_path, *given)
    assert run.losses == pytest.approx(plain.losses[:2], rel=1e-4)


def test_batch_and_accumulation_agree(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    whole = run_script(
        "train_db", tmp_path / "4", *arguments(models["sd1"], write_dataset(data, batch_size=4), steps=2)
    )
    given = arguments(models["sd1"], write_dataset(data), "--gradient_accumulation_steps=2", steps=2)
    split = run_script("train_db", tmp_path / "2x2", *given)
    assert len(whole.losses) == 2
    assert split.losses == pytest.approx(whole.losses, abs=1e-4)


@pytest.mark.slow
def test_two_processes_agree_with_one(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """With a text encoder that is stopped half-way, and so without gradients from then on."""
    more = ("--stop_text_encoder_training=2", "--save_model_as=safetensors")
    whole = run_script("train_db", tmp_path / "1", *arguments(models["sd1"], write_dataset(data, batch_size=4), *more))
    output = tmp_path / "2"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    command = [
        *(sys.executable, *launcher, "--rdzv_endpoint=localhost:0", str(ROOT / "train_db.py")),
        *(f"--output_dir={output}", "--seed=7", f"--logging_dir={output / 'log'}"),
        *arguments(models["sd1"], write_dataset(data, batch_size=2), *more),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert read_losses(output / "log") == pytest.approx(whole.losses, abs=1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Stopped after one step; the text encoder stops after two."""
    given = arguments(
        models["sd1"],
        write_dataset(data, more="shuffle_caption = true\ncaption_dropout_rate = 0.2"),
        "--stop_text_encoder_training=2",
        "--learning_rate_te=5e-4",
        "--lr_scheduler=cosine",
        "--save_model_as=safetensors",
        steps=3,
    )
    whole = run_script("train_db", tmp_path / "whole", *given, "--save_state", "--save_every_n_steps=1")
    state = whole.folder / "at-step00000001-state"
    resumed = run_script("train_db", tmp_path / "resumed", *given, f"--resume={state}")
    assert resumed.losses == whole.losses[1:]
    assert resumed.tensor_hash() == whole.tensor_hash()
    # A rate of its own makes the text encoder a group of its own.
    log = whole.folder / "log"
    assert read_scalars(log, "lr/unet") == pytest.approx([1e-3, 7.5e-4, 2.5e-4])
    assert read_scalars(log, "lr/text_encoder1") == pytest.approx([5e-4, 3.75e-4, 1.25e-4])
    assert next(log.glob("*/dreambooth"))


def test_a_state_of_other_parts_is_refused_in_one_line(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), steps=1)
    run = run_script("train_db", tmp_path / "both", *given, "--save_state_on_train_end")
    more = (f"--resume={run.folder / 'last-state'}", "--stop_text_encoder_training=-1", "--max_train_steps=2")
    more = (*more, "--resume_allow_changes")
    with pytest.raises(UserError, match=r"it has \d+ tensors more \(for example text_encoder\.") as error:
        run_script("train_db", tmp_path / "one", *given, *more)
    assert len(error.value.problems[0].what) < 200


def test_the_text_encoder_stops_at_its_step(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    base = tiny_ldm(tmp_path, "sd1", layers_per_block=1)
    untouched = base.read_bytes()
    more = ("--stop_text_encoder_training=2", "--save_every_n_steps=1")
    run = run_script("train_db", tmp_path / "out", *arguments(base, write_dataset(data), *more, steps=3))
    weights = [loaded(path) for path in (base, *sorted(run.folder.glob("at-step*.safetensors")))]
    assert len(weights) == 4
    assert [changed(before, after) for before, after in zip(weights, weights[1:], strict=False)] == [
        {"unet", "text_encoder"},
        {"unet", "text_encoder"},
        {"unet"},
    ]
    assert base.read_bytes() == untouched


def test_the_text_encoder_is_never_trained(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--stop_text_encoder_training=-1", steps=1)
    run = run_script("train_db", tmp_path, *given, "--save_model_as=safetensors", "--save_state")
    assert changed(loaded(models["sd1"]), loaded(run.folder / "last.safetensors")) == {"unet"}
    state = read_tensors(run.folder / "last-state" / "model.safetensors").tensors
    assert {name.split(".")[0] for name in state} == {"unet"}


@pytest.mark.parametrize(("stop", "trained"), [(None, [0, 1, 2]), (2, [0, 1]), (1, [0]), (0, []), (-1, [])])
def test_the_steps_in_which_the_text_encoder_is_trained(stop: int | None, trained: list[int]) -> None:
    from library.full_model_options import DreamBoothOptions

    parts = DreamBoothOptions(stop_text_encoder_training=stop).parts(1e-6)
    assert [step for step in range(3) if parts.text_encoder_at(step)] == trained
    assert parts.text_encoder == bool(trained)


def test_metadata_is_a_model_card_without_paths(plain: Run, models: dict[str, Path]) -> None:
    metadata = read_metadata(plain.folder / "last.safetensors")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert not [name for name in metadata if name.startswith("ss_")]
    assert str(models["sd1"].parent) not in str(metadata)
    assert str(plain.folder.parent) not in str(metadata)


def test_the_prior_loss_weight_is_that_of_regularisation_images(models: dict[str, Path], tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "1_shs thing", 2)
    write_images(tmp_path / "reg" / "1_thing", 2, seed=1)
    losses = {}
    for weight in (0, 0.5, 1):
        run = run_script(
            "train_db",
            tmp_path / f"out-{weight}",
            f"--pretrained_model_name_or_path={models['sd1']}",
            *(f"--train_data_dir={tmp_path / 'train'}", f"--reg_data_dir={tmp_path / 'reg'}"),
            *("--resolution=64", "--caption_extension=.txt", "--train_batch_size=4", f"--prior_loss_weight={weight}"),
            *("--max_train_steps=1", "--max_data_loader_n_workers=0"),
        )
        (losses[weight],) = run.losses
    assert 0 < losses[0] < losses[1]
    assert losses[0.5] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_without_padding_the_unet_sees_the_caption_alone(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--no_token_padding", steps=1)
    run = run_script("train_db", tmp_path, *given)
    expected = first_batch(models["sd1"], data / "images", padded=False)
    assert run.losses[0] == pytest.approx(np.mean([example.loss for example in expected]), rel=1e-4)
    assert run.losses[0] != pytest.approx(plain.losses[0], rel=1e-3)


def uneven(folder: Path) -> Path:
    config = write_dataset(folder, images=2)
    (folder / "images" / "01.txt").write_text("a thing of quite another length", encoding="utf-8")
    return config


def test_without_padding_captions_of_different_lengths_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 to 6 tokens cannot share a batch"):
        run_script("train_db", tmp_path / "out", *arguments(models["sd1"], uneven(tmp_path), "--no_token_padding"))


WRONG = {
    "stop without text encoder": (
        ["--learning_rate_te=0", "--stop_text_encoder_training=2"],
        "never begins|leaves out",
    ),
    "nothing trained": (["--learning_rate=0"], "nothing is trained"),
    "nothing trained later": (
        ["--learning_rate=0", "--learning_rate_te=1e-3", "--stop_text_encoder_training=2"],
        "nothing is trained from step 2 on",
    ),
    "static graph": (["--ddp_static_graph", "--stop_text_encoder_training=2"], "promises"),
    "long captions": (["--no_token_padding", "--max_token_length=225"], "does not go together"),
    "network's option": (["--network_dim=4"], "network_dim"),
    "fine-tuning's option": (["--train_text_encoder"], "train_text_encoder"),
    "format": (["--save_model_as=pt"], "save_model_as"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_refused(given: list[str], message: str, models: dict[str, Path], data: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_script("train_db", data / "none", *arguments(models["sd1"], write_dataset(data)), *given)


def test_metadata_sets_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    (tmp_path / "captions.json").write_text('{"00": {"caption": "a thing"}}', encoding="utf-8")
    described = [f"--train_data_dir={tmp_path / 'images'}", f"--in_json={tmp_path / 'captions.json'}"]
    model = f"--pretrained_model_name_or_path={models['sd1']}"
    with pytest.raises(UserError, match="not on a metadata file"):
        run_script("train_db", tmp_path / "out", model, "--resolution=64", *described)


def test_a_folder_that_training_did_not_write_is_not_replaced(models: dict[str, Path], data: Path) -> None:
    given = arguments(models["sd1"], write_dataset(data), "--save_model_as=diffusers", "--output_name=dog", "--ema")
    for taken in ("dog", "dog-ema"):
        (data / taken / taken).mkdir(parents=True)
        with pytest.raises(UserError, match=f"{taken} is a folder that training did not write"):
            run_script("train_db", data / taken, *given)


def test_notices() -> None:
    from library.options import parse_options
    from train_db import Options

    told: list[str] = []
    given = ["--v2", "--clip_skip=2", "--stop_text_encoder_training=-1", "--learning_rate_te=1e-5"]
    parse_options(Options, given, prog="train_db.py", description="", announce=told.append)
    parse_options(
        Options, ["--stop_text_encoder_training=1600"], prog="train_db.py", description="", announce=told.append
    )
    assert any("--clip_skip 2 with --v2" in text for text in told)
    assert any("without effect" in text and "--learning_rate_te" in text for text in told)
    assert any("is not reached in 1600 steps" in text for text in told)


@pytest.mark.parametrize("single_file", [False, True])
def test_a_dry_run_knows_how_much_is_trained(
    single_file: bool, models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.models.size import size_of_model

    model = tiny_ldm(tmp_path, "sd2", layers_per_block=1) if single_file else models["sd2"]
    size = size_of_model(str(model))
    weights = loaded(models["sd2"], "--v2")
    assert size is not None
    for part, counted in (("unet", size.unet), ("text_encoder", size.text_encoder)):
        values = sum(t.numel() for name, t in weights.items() if name.startswith(part) and "position_ids" not in name)
        assert counted == values
    given = arguments(model, write_dataset(data), "--dry_run", "--v2", "--save_state")
    assert run_script("train_db", tmp_path / "out", *given).code == 0
    shown = capsys.readouterr().out
    assert f"1 model of {size.total * 4 / 1e6:.3g} MB" in shown
    assert f"1 state of up to {(size.unet + size.text_encoder) * 12 / 1e6:.3g} MB" in shown
