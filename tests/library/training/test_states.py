import json
import os
import shutil

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.training import states
from library.training.lr_schedulers import build_lr_scheduler
from library.training.optimizers import build_optimizer
from library.training.options import OptimizerOptions, SchedulerOptions
from library.training.restoring import restore
from library.training.states import (
    TrainingState,
    check_state,
    find_states,
    newest_state,
    read_state,
    seed_of,
    write_state,
)

FILES = ["fingerprint.json", "manifest.json", "model.safetensors", "optimizer.bin", "scheduler.bin", "train_state.json"]


def state_at(step, **changes):
    values = {"tensors": {"w": torch.full((3,), float(step))}, "optimizer": {"a": 1}, "scheduler": {"b": (2, 3)}}
    return TrainingState(step=step, epoch=2, **{**values, **changes})


class Run:
    """A small run of which every part can be thrown away and made again."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 80))
        first, last = self.module[0].parameters(), self.module[2].parameters()
        groups = [
            {"params": list(first), "lr": 1e-2, "name": "unet"},
            {"params": list(last), "lr": 3e-3, "name": "textencoder"},
        ]
        self.optimizer = build_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1e-2), groups).optimizer
        schedule = SchedulerOptions(lr_scheduler="cosine", lr_warmup_steps=3)
        self.scheduler = build_lr_scheduler(schedule, self.optimizer, 10)
        self.step = 0

    def train(self, steps):
        for _ in range(steps):
            inputs = torch.randn(8, 80, generator=torch.Generator().manual_seed(self.step))
            nn.functional.mse_loss(self.module(inputs), inputs.sin()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1
        return self

    def save(self, folder):
        write_state(
            folder,
            TrainingState(
                step=self.step,
                epoch=1,
                tensors=self.module.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scheduler=self.scheduler.state_dict(),
            ),
        )

    def load(self, folder):
        state = read_state(folder)
        self.module.load_state_dict(dict(state.tensors))
        restore(state, optimizer=self.optimizer, scheduler=self.scheduler)
        self.step = state.step
        return self


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion", "SGDNesterov"])
def test_continuing_equals_the_uninterrupted_run(tmp_path, name):
    whole = Run(name).train(10)
    Run(name).train(4).save(tmp_path / "toy-state")
    continued = Run(name).load(tmp_path / "toy-state").train(6)
    assert continued.step == 10
    for one, other in zip(whole.module.parameters(), continued.module.parameters(), strict=True):
        assert torch.equal(one, other)
    untouched = Run(name)
    assert not torch.equal(untouched.module[0].weight, whole.module[0].weight)


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdamW8bit", "PagedLion8bit"])
def test_what_is_paged_is_paged_again(tmp_path, name):
    """A stand-in for pages, which only a GPU has: memory that its optimizer has marked."""
    saved = Run(name).train(4)
    saved.save(tmp_path / "toy-state")
    other = Run(name)
    make = other.optimizer.get_state_buffer

    def paged(parameter, dtype):
        buffer = make(parameter, dtype=dtype)
        buffer.is_paged = True
        return buffer

    other.optimizer.get_state_buffer = paged
    other.load(tmp_path / "toy-state")
    for one, mine in zip(saved.module.parameters(), other.module.parameters(), strict=True):
        before, after = saved.optimizer.state[one], other.optimizer.state[mine]
        assert before.keys() == after.keys()
        marked = {entry for entry, value in after.items() if getattr(value, "is_paged", False)}
        assert marked == {"state1", "state2"} & before.keys()
        for entry, value in before.items():
            assert after[entry] == value if entry == "step" else torch.equal(after[entry], value)


def test_folder_holds_exactly_these_files(tmp_path):
    write_state(tmp_path / "toy-state", state_at(5))
    assert sorted(path.name for path in (tmp_path / "toy-state").iterdir()) == FILES
    assert os.listdir(tmp_path) == ["toy-state"]
    progress = json.loads((tmp_path / "toy-state" / "train_state.json").read_text())
    assert (progress["current_epoch"], progress["current_step"]) == (2, 5)


def test_everything_comes_back(tmp_path):
    written = state_at(5, scaler={"scale": 65536.0}, fingerprint={"data": "abc"})
    write_state(tmp_path / "s-state", written)
    found = read_state(tmp_path / "s-state")
    assert torch.equal(found.tensors["w"], torch.full((3,), 5.0))
    assert (found.step, found.epoch) == (5, 2)
    assert (found.optimizer, found.scheduler, found.scaler) == ({"a": 1}, {"b": (2, 3)}, {"scale": 65536.0})
    assert found.fingerprint == {"data": "abc"}


@pytest.mark.parametrize("name", FILES)
def test_a_state_without_one_of_its_files_is_refused(tmp_path, name):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))
    (folder / name).unlink()
    with pytest.raises(UserError, match="toy-state is not a complete state"):
        read_state(folder)
    assert check_state(folder)
    assert find_states(tmp_path) == []


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_single_changed_byte_is_noticed(tmp_path, name):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"damaged: {name}"):
        read_state(folder)


def test_a_cut_file_is_noticed_without_reading_it(tmp_path):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))
    os.truncate(folder / "optimizer.bin", 10)
    (problem,) = check_state(folder)
    assert "wrong size: optimizer.bin" in problem.what


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"format": 1, "files": {"../x": {}}}', '{"format": 9, "files": {}}']
)
def test_a_broken_manifest_is_no_state(tmp_path, manifest):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="not a complete state"):
        read_state(folder)


def test_the_output_folder_instead_of_a_state_lists_its_states(tmp_path):
    write_state(tmp_path / "toy-000001-state", state_at(4))
    write_state(tmp_path / "toy-step00000010-state", state_at(10))
    (problem,) = check_state(tmp_path)
    assert problem.remedy is not None
    first, second = problem.remedy.index("toy-000001-state"), problem.remedy.index("toy-step00000010-state")
    assert first < second


def test_a_missing_state_lists_those_beside_it(tmp_path):
    write_state(tmp_path / "toy-000001-state", state_at(4))
    (problem,) = check_state(tmp_path / "toy-000002-state")
    assert "does not exist" in problem.what
    assert "toy-000001-state" in str(problem.remedy)


def test_a_file_instead_of_a_state(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (problem,) = check_state(tmp_path / "model.safetensors")
    assert "is a file, not a state folder" in problem.what


def test_a_state_of_the_same_name_is_replaced(tmp_path):
    write_state(tmp_path / "toy-state", state_at(5))
    write_state(tmp_path / "toy-state", state_at(6))
    assert read_state(tmp_path / "toy-state").step == 6
    assert os.listdir(tmp_path) == ["toy-state"]


def test_room_is_asked_for_by_the_tensors_at_any_depth(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("library.disk_space.check_room", lambda path, size: asked.update({path.name: size}))
    moments = {"state": {0: {"exp_avg": torch.zeros(5), "steps": [torch.zeros(2, dtype=torch.float64)]}}, "lr": 1e-3}
    write_state(tmp_path / "toy-state", state_at(5, optimizer=moments, ema={"w": torch.zeros(3, dtype=torch.bfloat16)}))
    assert asked["optimizer.bin"] == 5 * 4 + 2 * 8
    assert asked["scheduler.bin"] == 0
    assert asked["toy-state"] == 3 * 4 + 5 * 4 + 2 * 8 + 3 * 2


def test_a_failing_write_keeps_the_former_state(tmp_path, monkeypatch):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))

    def full(*arguments, **values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "sha256_of_file", full)
    with pytest.raises(UserError, match="cannot write toy-state: No space left on device"):
        write_state(folder, state_at(6))
    monkeypatch.undo()
    assert read_state(folder).step == 5
    assert os.listdir(tmp_path) == ["toy-state"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))
    with pytest.raises(UserError, match="not finite"):
        write_state(folder, state_at(6, tensors={"w": torch.tensor([float("nan")])}))
    assert read_state(folder).step == 5


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    folder = tmp_path / "toy-state"
    write_state(folder, state_at(5))
    os.rename(folder, tmp_path / ".replaced-toy-state")
    assert read_state(folder).step == 5
    shutil.copytree(folder, tmp_path / ".replaced-toy-state")
    write_state(folder, state_at(6))
    assert os.listdir(tmp_path) == ["toy-state"]


def test_a_state_whose_name_another_program_holds_is_kept_under_another_one(tmp_path, monkeypatch):
    """As Windows does with a folder that a program has open."""
    replace = os.replace
    write_state(tmp_path / "toy-state", state_at(5))

    def held(source, target):
        if target == tmp_path / "toy-state" and source.name.startswith(".writing"):
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr("library.files.os.replace", held)
    with pytest.raises(UserError, match="held by another program; the new content is in toy-state-"):
        write_state(tmp_path / "toy-state", state_at(6))
    assert sorted(read_state(path).step for path in tmp_path.iterdir()) == [5, 6]
    assert read_state(tmp_path / "toy-state").step == 5


def test_leftovers_of_a_killed_write_are_cleared(tmp_path):
    (tmp_path / ".writing-0123abcd-toy-state").mkdir()
    write_state(tmp_path / "toy-state", state_at(5))
    assert os.listdir(tmp_path) == ["toy-state"]


def test_a_pickle_with_code_is_not_run(tmp_path):
    folder = tmp_path / "toy-state"
    target = tmp_path / "made"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    write_state(folder, state_at(5))
    torch.save({"a": Code()}, folder / "optimizer.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = folder / "optimizer.bin"
    manifest["files"]["optimizer.bin"] = {"size": content.stat().st_size, "sha256": states.sha256_of_file(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="optimizer.bin of the state cannot be read"):
        read_state(folder)
    assert not target.exists()


def test_a_state_of_other_parameters_is_refused(tmp_path):
    Run("AdamW").save(tmp_path / "s-state")
    other = Run("AdamW")
    other.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="does not fit this run"):
        restore(read_state(tmp_path / "s-state"), optimizer=other.optimizer, scheduler=other.scheduler)


def test_the_newest_state_is_the_one_that_was_saved_last(tmp_path, monkeypatch):
    for at, (step, name) in enumerate([(9, "old-step00000009-state"), (2, "run-timed-state"), (4, "run-000001-state")]):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(1000 + at))
        write_state(tmp_path / name, state_at(step, fingerprint={"options": {"seed": step}}))
    assert [path.name for path in find_states(tmp_path)][-1] == "run-000001-state"
    assert newest_state(tmp_path, lambda name: name.startswith("run")) == tmp_path / "run-000001-state"
    assert newest_state(tmp_path, lambda name: name.startswith("other")) is None
    assert seed_of(tmp_path / "run-000001-state") == 4
    assert seed_of(tmp_path) is None


def test_the_same_state_is_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000")
    for name in ("one-state", "other-state"):
        write_state(tmp_path / name, state_at(5))
    for name in FILES:
        assert (tmp_path / "one-state" / name).read_bytes() == (tmp_path / "other-state" / name).read_bytes()


def test_a_damaged_state_is_passed_over(tmp_path, monkeypatch, caplog):
    for at, name in enumerate(["good-state", "damaged-state"]):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(1000 + at))
        write_state(tmp_path / name, state_at(at + 1))
    content = bytearray((tmp_path / "damaged-state" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged-state" / "model.safetensors").write_bytes(content)
    assert newest_state(tmp_path, lambda name: True) == tmp_path / "good-state"
    assert "damaged: model.safetensors" in caplog.text


def test_a_replacement_that_was_cut_off_is_found(tmp_path):
    write_state(tmp_path / ".replaced-run-timed-state", state_at(3))
    assert [path.name for path in find_states(tmp_path)] == ["run-timed-state"]
