"""Memory that runs out: the message says what would need less, and only what is not on already."""

import os
import re
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_db
import train_network
from library.breakdowns import _SAVINGS
from library.errors import EXIT_USER_ERROR, UserError
from library.options import declared_flags
from tests.faults.runs import RESULT, arguments, names, train
from tests.scripts.runs import Run

ROOT = Path(__file__).parents[2]


def run_out(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    from library.task import DenoisingTask

    original: Callable[..., torch.Tensor] = DenoisingTask.losses

    def losses(self: Any, batch: Any, context: torch.Tensor) -> torch.Tensor:
        if batch.step + 1 == step:
            raise error
        return original(self, batch, context)

    monkeypatch.setattr(DenoisingTask, "losses", losses)


ON_CPU = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: {}: you tried to allocate 4000000000 bytes."
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(ON_CPU.format("can't allocate memory")),
    "windows": RuntimeError(ON_CPU.format("not enough memory")),
    "python": MemoryError(),
    "system": OSError(12, "Cannot allocate memory"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_the_message_and_what_is_left(
    kind: str, model: Path, plain: Callable[[int], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model, tmp_path)
    with monkeypatch.context() as patch:
        run_out(patch, 3, ERRORS[kind])
        with pytest.raises(UserError, match="memory ran out") as caught:
            train(tmp_path / "out", *given)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    flags = ["--train_batch_size", "--gradient_checkpointing", "--cache_latents", "--mixed_precision", "--fp8_base"]
    found = [next(number for number, line in enumerate(lines) if flag in line) for flag in flags]
    assert found == sorted(found)
    assert not any("--fused_backward_pass" in line or "workers" in line for line in lines)
    if kind != "python":
        return
    assert names(tmp_path / "out") == {
        "thing-step00000002.safetensors",
        "thing-step00000002-state",
        "log",
        "thing-report.html",
    }
    resumed = train(tmp_path / "out", *given, f"--resume={tmp_path / 'out' / 'thing-step00000002-state'}")
    assert resumed.tensor_hash(RESULT) == plain(4).tensor_hash(RESULT)


def test_what_the_failed_step_held_is_gone_when_the_save_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.hooks import Hooks
    from library.task import DenoisingTask

    original, save, held, alive = DenoisingTask.losses, Hooks.save_after_failure, [], []

    def losses(self: Any, batch: Any, context: torch.Tensor) -> torch.Tensor:
        found = original(self, batch, context)
        if batch.step + 1 == 3:
            held.append(weakref.ref(found))
            raise ERRORS["cuda"]
        return found

    def watched(self: Hooks, step: int) -> None:
        alive.extend(one() is not None for one in held)
        save(self, step)

    monkeypatch.setattr(DenoisingTask, "losses", losses)
    monkeypatch.setattr(Hooks, "save_after_failure", watched)
    with pytest.raises(UserError, match="memory ran out") as caught:
        train(tmp_path / "out", *arguments(model, tmp_path))
    assert alive == [False]
    assert "in losses" in "".join(traceback.format_exception(caught.value))
    assert "thing-step00000002-state" in names(tmp_path / "out")


def test_what_is_on_already_is_not_advised(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = [
        "--gradient_checkpointing",
        "--cache_latents",
        "--mixed_precision=bf16",
        "--fp8_base",
        "--network_train_unet_only",
    ]
    run_out(monkeypatch, 1, ERRORS["cuda"])
    with pytest.raises(UserError) as caught:
        train(tmp_path / "out", *arguments(model, tmp_path), *on, "--optimizer_type=Lion")
    text = str(caught.value)
    assert "--train_batch_size" in text
    assert "--resolution" in text
    for flag in (*on, "AdamW8bit"):
        assert flag.partition("=")[0] not in text


@pytest.mark.parametrize("rank", [10**12, 10**18])
def test_a_network_that_no_memory_holds(model: Path, tmp_path: Path, rank: int) -> None:
    given = [one for one in arguments(model, tmp_path) if not one.startswith("--network_dim")]
    with pytest.raises(UserError, match="memory ran out") as caught:
        train(tmp_path / "out", *given, f"--network_dim={rank}")
    assert "smaller rank" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_flag_that_is_advised_exists() -> None:
    known = {*declared_flags(train_network.Options), *declared_flags(train_db.Options)}
    for saving in _SAVINGS:
        flags = re.findall(r"--(\w+)", saving.options)
        assert flags
        assert set(flags) <= known


# Training begins with little more memory than the process has by then.
LIMITED = """
import resource, sys
from library import run
from library.errors import run_script
import train_network

original = run.fit

def fit(*given, **more):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return original(*given, **more)

run.fit = fit
run_script(train_network.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process cannot be limited")
def test_a_process_that_really_has_too_little(model: Path, tmp_path: Path) -> None:
    given = arguments(model, tmp_path, f"--output_dir={tmp_path / 'out'}")
    toml = tmp_path / "dataset-2.toml"
    toml.write_text(toml.read_text().replace("resolution = 64", "resolution = 1024").replace("_size = 2", "_size = 8"))
    command = [sys.executable, "-c", LIMITED, *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    assert done.returncode == EXIT_USER_ERROR, done.stderr[-3000:]
    assert "memory ran out" in done.stderr
    assert "Traceback" not in done.stderr
