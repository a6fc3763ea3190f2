import logging

import pytest
import torch

from library.errors import UserError
from library.files import write_tensors
from library.training.naming import END, OutputNames, SavePlan
from library.training.saving import ModelSaver, StateSaver
from library.training.states import TrainingState, read_state
from tests.library.training.moments import moments


def saver(folder, plan, **changes):
    def save(path, step, epoch):
        write_tensors(path, {"w": torch.tensor([float(step)])}, metadata={"step": str(step), "epoch": str(epoch)})

    return ModelSaver(plan, OutputNames(folder=folder, name="toy", suffix=".safetensors"), save, **changes)


def run(hook, total_steps, steps_per_epoch):
    for moment in moments(total_steps, steps_per_epoch):
        hook(moment)


def written(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_exact_set_of_models(tmp_path):
    run(saver(tmp_path, SavePlan(every_epochs=1, every_steps=4, keep_epochs=2, keep_steps=4)), 13, 3)
    assert written(tmp_path) == [
        "toy-000003.safetensors",
        "toy-000004.safetensors",
        "toy-step00000008.safetensors",
        "toy-step00000012.safetensors",
        "toy.safetensors",
    ]


def test_models_are_told_step_and_epoch(tmp_path):
    told = []
    names = OutputNames(folder=tmp_path, name=None, suffix=".pt")

    def save(path, step, epoch):
        told.append((path.name, step, epoch))
        path.write_bytes(b"x")

    run(ModelSaver(SavePlan(every_epochs=2, every_steps=3), names, save), 8, 2)
    assert told == [
        ("at-step00000003.pt", 3, 1),
        ("epoch-000002.pt", 4, 2),
        ("at-step00000006.pt", 6, 3),
        ("last.pt", 8, 4),
    ]


def test_files_of_other_runs_stay(tmp_path):
    (tmp_path / "toy-step00000003.safetensors").write_bytes(b"another run")
    run(saver(tmp_path, SavePlan(every_steps=4, keep_steps=4)), 13, 13)
    assert "toy-step00000003.safetensors" in written(tmp_path)


def test_nothing_is_removed_when_the_new_file_is_not_whole(tmp_path):
    names = OutputNames(folder=tmp_path, name="toy", suffix=".safetensors")

    def save(path, step, epoch):
        write_tensors(path, {"w": torch.zeros(64)})
        if step == 3:
            path.write_bytes(path.read_bytes()[:-1])

    hook = ModelSaver(SavePlan(every_steps=1, keep_steps=1), names, save)
    with pytest.raises(UserError, match="toy-step00000003.safetensors is not whole"):
        run(hook, 4, 4)
    assert "toy-step00000001.safetensors" in written(tmp_path)
    assert hook.last_saved == tmp_path / "toy-step00000002.safetensors"


def test_a_model_may_be_a_folder(tmp_path):
    names = OutputNames(folder=tmp_path, name="toy", suffix="")

    def save(path, step, epoch):
        path.mkdir(parents=True)
        (path / "weights.bin").write_bytes(b"x")

    run(ModelSaver(SavePlan(every_steps=1, keep_steps=1), names, save), 3, 3)
    assert written(tmp_path) == ["toy", "toy-step00000002", "toy-step00000003"]


def test_only_the_main_process_writes(tmp_path):
    run(saver(tmp_path, SavePlan(every_steps=1), is_main=False), 3, 3)
    assert written(tmp_path) == []


def test_console_lines(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    run(saver(tmp_path / "out", SavePlan(every_steps=2, keep_steps=1)), 5, 5)
    assert [record.message for record in caplog.records] == [
        "saving checkpoint: out/toy-step00000002.safetensors",
        "saving checkpoint: out/toy-step00000004.safetensors",
        "removing old checkpoint: out/toy-step00000002.safetensors",
        "saving checkpoint: out/toy.safetensors",
    ]


def states(folder, plan, *, every_time):
    def capture(step, epoch):
        return TrainingState(step=step, epoch=epoch, tensors={"w": torch.zeros(1)}, optimizer={}, scheduler={})

    names = OutputNames(folder=folder, name="toy", suffix=".safetensors")
    return StateSaver(plan, names, capture, every_time=every_time)


def test_the_exact_set_of_states(tmp_path):
    run(states(tmp_path, SavePlan(every_epochs=1, every_steps=4, keep_epochs=1), every_time=True), 10, 3)
    assert written(tmp_path) == ["toy-000003-state", "toy-state", "toy-step00000004-state", "toy-step00000008-state"]
    assert read_state(tmp_path / "toy-000003-state").step == 9
    assert (read_state(tmp_path / "toy-state").step, read_state(tmp_path / "toy-state").epoch) == (10, 4)


def test_a_state_only_at_the_end(tmp_path):
    run(states(tmp_path, SavePlan(every_epochs=1, every_steps=2), every_time=False), 10, 3)
    assert written(tmp_path) == ["toy-state"]


def test_saving_on_demand(tmp_path):
    hook = states(tmp_path, SavePlan(), every_time=False)
    hook.save(END, step=7, epoch=2)
    assert read_state(tmp_path / "toy-state").step == 7
