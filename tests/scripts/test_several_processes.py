"""Two processes on the CPU, started as the documentation says, against one."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.scripts.methods import RESULT, SCRIPTS, method_arguments
from tests.scripts.runs import read_losses, run_script, tensor_hash
from tests.tiny import Kind, tiny_sd

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"],
}


FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}


def in_two_processes(launcher: str, script: str, output: Path, *arguments: str) -> list[float]:
    """The losses of a run of two processes."""
    port = ["--main_process_port=0"] if launcher == "accelerate" else []
    command = [
        *(sys.executable, "-m", *LAUNCHERS[launcher], *port, str(ROOT / f"{script}.py")),
        *(f"--output_dir={output}", f"--logging_dir={output / 'log'}", "--seed=7", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    return read_losses(output / "log")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "launcher", "more"),
    [
        ("fine_tune", "accelerate", ["--train_text_encoder"]),
        ("train_network", "torchrun", ["--mixed_precision=bf16", "--fp8_base"]),
        ("train_db", "torchrun", ["--torch_compile", "--dynamo_backend=eager", "--ddp_timeout=5"]),
        ("train_network", "accelerate", ["--ddp_gradient_as_bucket_view", "--ddp_static_graph"]),
    ],
)
def test_two_processes_agree_with_one(script: str, launcher: str, more: list[str], tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "sd1", "sd1", layers_per_block=1)
    whole = run_script(script, tmp_path / "1", *method_arguments(script, model, tmp_path, batch_size=4), *more)
    given = method_arguments(script, model, tmp_path, batch_size=2)
    losses = in_two_processes(launcher, script, tmp_path / "2", *given, *more)
    assert len(losses) == 2
    assert losses == pytest.approx(whole.losses, rel=5e-3 if "--fp8_base" in more else 1e-4)
    assert tensor_hash(tmp_path / "2" / RESULT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind) for kind in FLAGS}


@pytest.fixture(scope="module")
def in_pairs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two processes of every script on every kind of model, all in one launch."""
    folder = tmp_path_factory.mktemp("pairs")
    jobs = []
    for script, kind in product(SCRIPTS, FLAGS):
        given = given_to(script, kind, models, folder / "data" / script, batch_size=1)
        jobs.append([script, [*given, *outputs_to(folder / f"{script}-{kind}")]])
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "tests.scripts.in_turn", str(folder / "jobs.json")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    return folder


def given_to(script: str, kind: Kind, models: dict[str, Path], folder: Path, *, batch_size: int) -> list[str]:
    return [*method_arguments(script, models[kind], folder, batch_size=batch_size), *FLAGS[kind]]


def outputs_to(output: Path) -> list[str]:
    return [f"--output_dir={output}", f"--logging_dir={output / 'log'}", "--seed=7"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_method_on_every_model_agrees(
    script: str, kind: Kind, models: dict[str, Path], in_pairs: Path, tmp_path: Path
) -> None:
    whole = run_script(script, tmp_path / "1", *given_to(script, kind, models, tmp_path, batch_size=2))
    losses = read_losses(in_pairs / f"{script}-{kind}" / "log")
    assert len(losses) == 2
    assert losses == pytest.approx(whole.losses, rel=1e-4)
