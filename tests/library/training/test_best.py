"""The mark of the best model, and what it keeps from being removed."""

import json
import math

import pytest
import torch

from library.files import write_tensors
from library.training.best import BestModel
from library.training.naming import OutputNames, SavePlan
from library.training.saving import ModelSaver
from tests.library.training.moments import moments


def run(folder, losses, plan, *, weights=("model",), continued=False, start=0):
    """Save by ``plan`` in a run whose validation losses are ``losses``, by step."""
    best = BestModel(folder, "toy", continued=continued)
    names = OutputNames(folder=folder, name="toy", suffix=".safetensors")

    def save(path, step, epoch):
        write_tensors(path, {"w": torch.tensor([float(step)])})

    savers = [
        ModelSaver(plan, names if one == "model" else names.of_average(), save, best=best, weights=one)
        for one in weights
    ]
    for moment in moments(len(losses), len(losses))[start:]:
        measured = losses[moment.step - 1]
        if measured is not None:
            best.measured(moment.step, measured if isinstance(measured, dict) else {"model": measured})
        for saver in savers:
            saver(moment)
    return best


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def read(folder):
    return json.loads((folder / "toy-best.json").read_text())


def step_file(step):
    return f"toy-step{step:08d}.safetensors"


def test_the_mark_names_the_lowest_loss(tmp_path):
    run(tmp_path, [5.0, 3.0, 4.0, 3.5], SavePlan(every_steps=1))
    assert read(tmp_path) == {"file": step_file(2), "step": 2, "loss": 3.0, "outlived": False}


def test_retention_keeps_the_best_until_a_better_one(tmp_path):
    run(tmp_path, [5.0, 3.0, 4.0, 3.5, 3.4, 6.0], SavePlan(every_steps=1, keep_steps=1))
    assert written(tmp_path) == [
        "toy-best.json",
        step_file(2),
        step_file(5),
        step_file(6),
        "toy.safetensors",
    ]
    assert read(tmp_path)["outlived"] is True
    again = tmp_path / "again"
    again.mkdir()
    run(again, [5.0, 3.0, 4.0, 3.5, 2.0, 6.0], SavePlan(every_steps=1, keep_steps=1))
    assert written(again) == ["toy-best.json", step_file(5), step_file(6), "toy.safetensors"]


def test_models_without_a_figure_are_not_marked(tmp_path):
    run(tmp_path, [None, 3.0, None, None], SavePlan(every_steps=1))
    assert read(tmp_path)["step"] == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, loss):
    run(tmp_path, [loss, 3.0, loss], SavePlan(every_steps=1))
    assert read(tmp_path)["step"] == 2


def test_average_and_weights_compete(tmp_path):
    losses = [{"model": 5.0, "ema": 6.0}, {"model": 4.0, "ema": 3.0}, {"model": 3.5, "ema": 3.5}]
    run(tmp_path, losses, SavePlan(every_steps=1), weights=("model", "ema"))
    assert read(tmp_path)["file"] == "toy-step00000002-ema.safetensors"


def test_names_of_averages_and_their_retention(tmp_path):
    run(tmp_path, [None] * 3, SavePlan(every_steps=1, keep_steps=1), weights=("model", "ema"))
    stems = [f"toy-step{step:08d}{ema}.safetensors" for step in (2, 3) for ema in ("", "-ema")]
    assert written(tmp_path) == sorted([*stems, "toy.safetensors", "toy-ema.safetensors"])


def test_a_continued_run_goes_on_with_the_mark(tmp_path):
    losses = [2.0, 5.0, 4.0, 3.0]
    run(tmp_path, losses[:2], SavePlan(every_steps=1))
    best = run(tmp_path, losses, SavePlan(every_steps=1, keep_steps=1), continued=True, start=2)
    assert best.mark.step == 1
    assert (tmp_path / step_file(1)).exists()


def test_a_new_run_begins_anew(tmp_path):
    run(tmp_path, [1.0], SavePlan(every_steps=1))
    run(tmp_path, [5.0, 4.0], SavePlan(every_steps=1))
    assert read(tmp_path)["loss"] == 4.0


def test_a_mark_of_a_file_that_is_gone_or_replaced_does_not_stay(tmp_path):
    run(tmp_path, [1.0], SavePlan())
    (tmp_path / "toy.safetensors").unlink()
    assert BestModel(tmp_path, "toy", continued=True).mark is None
    run(tmp_path, [1.0], SavePlan())
    run(tmp_path, [1.0, 9.0], SavePlan(), continued=True, start=1)
    assert read(tmp_path)["loss"] == 9.0
    run(tmp_path, [1.0, 9.0, None], SavePlan(), continued=True, start=2)
    assert not (tmp_path / "toy-best.json").exists()


def test_a_damaged_mark_is_ignored(tmp_path):
    (tmp_path / "toy-best.json").write_text("{")
    assert BestModel(tmp_path, "toy", continued=True).mark is None


@pytest.mark.parametrize("name", ["../other.safetensors", "{outside}", "sub/other.safetensors", ".."])
def test_a_mark_names_nothing_outside_of_the_folder(tmp_path, name):
    """What it names may be removed."""
    folder, outside = tmp_path / "out", tmp_path / "other.safetensors"
    (folder / "sub").mkdir(parents=True)
    for path in (outside, folder / "sub/other.safetensors"):
        path.write_bytes(b"precious")
    mark = {"file": name.format(outside=outside), "step": 1, "loss": 9.0, "outlived": True}
    (folder / "toy-best.json").write_text(json.dumps(mark))
    assert BestModel(folder, "toy", continued=True).mark is None
