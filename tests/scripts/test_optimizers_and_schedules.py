"""Every optimizer and every schedule in a run of ``train_network.py``, on a small random model."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.files import read_metadata, read_tensors
from library.training.optimizer_kinds import KINDS
from tests.scripts.runs import Run, read_scalars, run_script, write_dataset
from tests.scripts.test_train_network import arguments
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]
RATE = 1e-2
# Each run has another schedule, with the rates of its two steps as parts of the learning rate.
SCHEDULES = {
    "constant": ((), (1, 1)),
    "constant_with_warmup": (("--lr_warmup_steps=2",), (0, 0.5)),
    "linear": ((), (1, 0.5)),
    "cosine": ((), (1, 0.5)),
    "cosine_with_restarts": (("--lr_scheduler_num_cycles=2",), (1, 1)),
    "polynomial": (("--lr_scheduler_power=2",), (1, 0.25)),
    "inverse_sqrt": (("--lr_scheduler_timescale=3",), (1, 0.75**0.5)),
    "cosine_with_min_lr": (("--lr_scheduler_min_lr_ratio=0.2",), (1, 0.6)),
    "warmup_stable_decay": (("--lr_decay_steps=50%", "--lr_warmup_steps=1"), (0, 1)),
    "piecewise_constant": (("--lr_scheduler_args", "step_rules=1:1,0.1"), (1, 0.1)),
    "StepLR": (("--scheduler_args", "step_size=1", "gamma=0.5"), (1, 0.5)),
    "torch.optim.lr_scheduler.ExponentialLR": (("--lr_scheduler_args", "gamma=0.25"), (1, 0.25)),
}
OPTIMIZERS = [*(kind.name for kind in KINDS), "NAdam", "bitsandbytes.optim.AdEMAMix8bit"]


def package_of(name: str) -> str:
    return next((kind.module for kind in KINDS if kind.name == name), name).partition(".")[0]


def needs(name: str) -> pytest.MarkDecorator:
    package = package_of(name)
    missing = package != name and importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd1"
    return tiny_sd(folder, layers_per_block=1, channels=(16, 16, 32, 32), norm_groups=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), batch_size=1, images=2)


def train(model: Path, dataset: Path, output: Path, *more: str, steps: int = 2) -> Run:
    given = arguments(model, dataset, "--network_train_unet_only", *more, steps=steps)
    return run_script("train_network", output, *given)


def rates(run: Run, tag: str = "lr/unet") -> list[float]:
    return read_scalars(run.folder / "log", tag)


def has_learnt(run: Run) -> bool:
    """Whether the half of the network that begins as zeros has changed."""
    tensors = read_tensors(run.folder / "last.safetensors").tensors
    return any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_up" in name)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in OPTIMIZERS])
def test_every_optimizer_trains(name: str, model: Path, dataset: Path, tmp_path: Path) -> None:
    rate = "1.0" if name.startswith(("DAdapt", "Prodigy")) else str(RATE)
    # RAdam only gathers figures in its first steps.
    arguments = ["--optimizer_args", "silent_sgd_phase=False"] if name.startswith("RAdam") else []
    run = train(model, dataset, tmp_path, f"--optimizer_type={name}", f"--learning_rate={rate}", *arguments)
    assert run.code == 0
    assert has_learnt(run)
    recorded = read_metadata(run.folder / "last.safetensors")
    assert "." in recorded["ss_optimizer"]
    if name == "AdaFactor":
        assert (recorded["ss_learning_rate"], recorded["ss_lr_scheduler"]) == ("None", f"adafactor:{RATE}")
    else:
        assert rates(run) == pytest.approx([float(rate)] * 2)
    found = rates(run, "lr/d*lr/unet")
    assert bool(found) == name.startswith(("DAdapt", "Prodigy"))
    assert all(0 < one < 1 for one in found)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_followed(name: str, model: Path, dataset: Path, tmp_path: Path) -> None:
    more, factors = SCHEDULES[name]
    flag = "--lr_scheduler" if name.islower() and "." not in name else "--lr_scheduler_type"
    run = train(model, dataset, tmp_path, f"{flag}={name}", f"--learning_rate={RATE}", *more)
    assert rates(run) == pytest.approx([RATE * factor for factor in factors], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_schedule_counts_optimizer_steps(accumulation: int, model: Path, dataset: Path, tmp_path: Path) -> None:
    more = ["--lr_scheduler=linear", "--lr_warmup_steps=0.5", f"--gradient_accumulation_steps={accumulation}"]
    run = train(model, dataset, tmp_path, *more, steps=4)
    assert rates(run) == pytest.approx([0, RATE / 2, RATE, RATE / 2])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_schedule_counts_optimizer_steps_of_two_processes(
    accumulation: int, model: Path, dataset: Path, tmp_path: Path
) -> None:
    more = ["--network_train_unet_only", "--lr_scheduler=linear", "--lr_warmup_steps=0.5"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=localhost:0", str(ROOT / "train_network.py"), f"--output_dir={tmp_path}", "--seed=7"),
        *(f"--logging_dir={tmp_path / 'log'}", f"--gradient_accumulation_steps={accumulation}"),
        *arguments(model, dataset, *more, steps=4),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert read_scalars(tmp_path / "log", "lr/unet") == pytest.approx([0, RATE / 2, RATE, RATE / 2])


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("Prodigy", "AdamWScheduleFree")])
def test_coupled_ones_train_bf16_weights(name: str, model: Path, dataset: Path, tmp_path: Path) -> None:
    given = [f"--optimizer_type={name}", "--learning_rate=1.0", "--full_bf16", "--mixed_precision=bf16"]
    given += ["--save_precision=float"]
    whole = train(model, dataset, tmp_path / "whole", *given, "--save_every_n_steps=1", "--save_state", steps=3)
    assert has_learnt(whole)
    (state,) = (path for path in (tmp_path / "whole").iterdir() if "1-state" in path.name)
    resumed = train(model, dataset, tmp_path / "resumed", *given, f"--resume={state}", steps=3)
    assert resumed.tensor_hash() == whole.tensor_hash()


@needs("AdamWScheduleFree")
def test_schedule_free_saves_its_average_and_continues_exactly(model: Path, dataset: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1", encoding="utf-8")
    often = ["--save_every_n_steps=2", "--save_state", "--validation_split=0.5", "--validate_every_n_steps=1"]
    often += [f"--sample_prompts={prompts}", "--sample_every_n_steps=1"]
    free = "--optimizer_type=AdamWScheduleFree"
    whole = train(model, dataset, tmp_path / "whole", free, *often, steps=4)
    plain = train(model, dataset, tmp_path / "plain", free, "--validation_split=0.5", steps=4)
    assert whole.tensor_hash() == plain.tensor_hash(), "saving and looking changed the training"
    (state,) = (path for path in (tmp_path / "whole").iterdir() if "2-state" in path.name)
    resumed = train(model, dataset, tmp_path / "resumed", free, "--validation_split=0.5", f"--resume={state}", steps=4)
    assert resumed.tensor_hash() == whole.tensor_hash()
    # The state has the point where training goes on, the file the average: they differ.
    kept = read_tensors(state / "model.safetensors").tensors
    (file,) = (path for path in (tmp_path / "whole").glob("*2.safetensors"))
    saved = read_tensors(file).tensors
    name = next(name for name in saved if name.endswith("lora_up.weight"))
    assert not kept[name].equal(saved[name])


def test_what_an_optimizer_refuses_is_told_before_the_model_is_loaded(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import library.models.stable_diffusion as loading

    monkeypatch.setattr(loading, "load_stable_diffusion", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="AdamW refuses its arguments"):
        train(model, dataset, tmp_path, "--optimizer_args", "betas=2,3")
    with pytest.raises(UserError, match="AdamW8bit refuses its arguments"):
        train(model, dataset, tmp_path, "--use_8bit_adam", "--optimizer_args", "betas=2,3")
    with pytest.raises(UserError, match="StepLR refuses its arguments"):
        train(model, dataset, tmp_path, "--lr_scheduler_type=StepLR")


def test_the_start_screen_has_the_curve(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(model, dataset, tmp_path, "--lr_scheduler=linear", "--learning_rate=0.01")
    assert (
        "learning rate (linear, of 0.01 or the part's own): 100 % at step 1, 50 % at step 2" in capsys.readouterr().err
    )
