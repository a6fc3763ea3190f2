import logging
import time

import pytest
import torch

from library.errors import UserError
from library.files import write_tensors
from library.training.naming import END, OutputNames, SavePlan
from library.training.options import SaveOptions
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


def states(folder, plan, clock=time.monotonic, **options):
    def capture(step, epoch):
        return TrainingState(step=step, epoch=epoch, tensors={"w": torch.zeros(1)}, optimizer={}, scheduler={})

    names = OutputNames(folder=folder, name="toy", suffix=".safetensors")
    return StateSaver(plan, names, capture, SaveOptions(**options), clock=clock)


def test_the_exact_set_of_states(tmp_path):
    run(states(tmp_path, SavePlan(every_epochs=1, every_steps=4, keep_epochs=1), save_state=True), 10, 3)
    assert written(tmp_path) == ["toy-000003-state", "toy-state", "toy-step00000004-state", "toy-step00000008-state"]
    assert read_state(tmp_path / "toy-000003-state").step == 9
    assert (read_state(tmp_path / "toy-state").step, read_state(tmp_path / "toy-state").epoch) == (10, 4)


def test_a_state_only_at_the_end(tmp_path):
    run(states(tmp_path, SavePlan(every_epochs=1, every_steps=2), save_state_on_train_end=True), 10, 3)
    assert written(tmp_path) == ["toy-state"]


def test_saving_on_demand(tmp_path):
    hook = states(tmp_path, SavePlan())
    hook.save(END, step=7, epoch=2)
    assert read_state(tmp_path / "toy-state").step == 7


def test_a_state_after_some_minutes_takes_the_place_of_the_one_before(tmp_path):
    """A step takes 40 seconds, saving none; what is saved anyway counts as well."""
    seconds = iter(range(0, 10_000, 40))
    hook = states(tmp_path, SavePlan(every_steps=5), lambda: next(seconds), save_state=True, save_state_every_minutes=1)
    found = []
    for moment in moments(9, 9):
        hook(moment)
        timed = tmp_path / "toy-timed-state"
        found.append(read_state(timed).step if timed.exists() else 0)
    assert found == [0, 2, 2, 4, 4, 4, 7, 7, 7]
    assert written(tmp_path) == ["toy-state", "toy-step00000005-state", "toy-timed-state"]


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        (
            "dog",
            ["dog.safetensors", "dog-state", "dog-000002.ckpt", "dog-step00000012-state", "dog-timed-state",
             "dog-000002-ema.safetensors", "dog-best.json", "dog"],
            ["dogs.safetensors", "dog-2.safetensors", "a-dog-state", "dog-2-state", "last-state"],
        ),
        (
            None,
            ["last.safetensors", "last-state", "epoch-000001.safetensors", "at-step00000002-state", "timed-state"],
            ["dog-000002-state", "two words.txt"],
        ),
    ],
)  # fmt: skip
def test_which_files_are_those_of_the_run(tmp_path, name, own, others):
    names = OutputNames(folder=tmp_path, name=name, suffix=".safetensors")
    assert [file for file in own if not names.owns(file)] == []
    assert [file for file in others if names.owns(file)] == []
