"""Runs of a tiny LoRA in which something goes wrong after a given step."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.runs import Run, run_script, write_dataset

NAME = "thing"
RESULT = f"{NAME}.safetensors"


def arguments(model: Path, folder: Path, *more: str, steps: int = 4, images: int = 8) -> list[str]:
    """Arguments of ``train_network``, whose images lie in ``folder / "images"``."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={write_dataset(folder, images=images)}",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-2",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        f"--output_name={NAME}",
        *more,
    ]


def train(output: Path, *given: str) -> Run:
    return run_script("train_network", output, *given)


def after_steps(monkeypatch: pytest.MonkeyPatch, events: Mapping[int, Callable[[], object]]) -> None:
    """Let each of ``events`` happen after its step, before anything is saved."""
    from library import run

    original = run.fit

    def fit(*given: Any, hooks: Any, **more: Any) -> int:
        def happen(moment: Any) -> None:
            events.get(moment.step, lambda: None)()

        return original(*given, hooks=[happen, *hooks], **more)

    monkeypatch.setattr(run, "fit", fit)


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the current, the home and the temporary folder be below ``folder``, so that a rescue stays there."""
    for name in ("current", "home", "temporary"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder / "current")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    return folder


def names(folder: Path) -> set[str]:
    """What lies in ``folder``, but for the manifests of runs."""
    return {name for name in os.listdir(folder) if not name.endswith(".run.json")}
