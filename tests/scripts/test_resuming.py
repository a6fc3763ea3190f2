"""Stopping anywhere and going on exactly: states that are found, what may change, signals, logs and previews."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks.training import NetworkTraining
from tests.library.training.test_report import Page
from tests.scripts.runs import Run, read_scalars, run_script, write_dataset
from tests.scripts.test_train_network import arguments
from tests.tiny import tiny_sd

STEPS = 6
NAMED = "--output_name=thing"
RESULT = "thing.safetensors"
AUTO = "--resume=auto"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


@pytest.fixture(scope="module")
def given(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four steps an epoch, so that the run ends in the middle of its second one."""
    dataset = write_dataset(tmp_path_factory.mktemp("data"), more="shuffle_caption = true\nflip_aug = true")
    return [*arguments(model, dataset, steps=STEPS), NAMED, "--lr_scheduler=cosine"]


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run, with a state after every step."""
    output = tmp_path_factory.mktemp("whole")
    return run_script("train_network", output, *given, "--save_state", "--save_every_n_steps=1")


def state(whole: Run, step: int) -> Path:
    return whole.folder / f"thing-step{step:08d}-state"


def train(output: Path, *given: str) -> Run:
    return run_script("train_network", output, *given)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], None]]], None]:
    """Let something happen within a step of the run, by its number."""
    original = NetworkTraining.after_step

    def prepare(happenings: dict[int, Callable[[], None]]) -> None:
        def after_step(self: NetworkTraining, step: int) -> dict[str, float]:
            happenings.get(step, lambda: None)()
            return original(self, step)

        monkeypatch.setattr(NetworkTraining, "after_step", after_step)

    return prepare


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# --- where a run goes on


def test_the_newest_state_is_found(whole: Run, given: list[str], tmp_path: Path) -> None:
    shutil.copytree(state(whole, 2), tmp_path / state(whole, 2).name)
    shutil.copytree(state(whole, 4), tmp_path / state(whole, 4).name)
    shutil.copytree(state(whole, 5), tmp_path / "another-step00000005-state")
    run = train(tmp_path, *given, AUTO)
    assert run.losses == whole.losses[4:]
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)


def test_a_damaged_newest_state_is_passed_over(whole: Run, given: list[str], tmp_path: Path) -> None:
    for step in (2, 4):
        shutil.copytree(state(whole, step), tmp_path / state(whole, step).name)
    weights = tmp_path / state(whole, 4).name / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    run = train(tmp_path, *given, AUTO)
    assert run.losses == whole.losses[2:]
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)


def test_without_a_state_the_run_begins_and_a_finished_one_stays(whole: Run, given: list[str], tmp_path: Path) -> None:
    run = train(tmp_path, *given, AUTO, "--save_state_on_train_end")
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    before = (tmp_path / RESULT).stat().st_mtime_ns
    again = train(tmp_path, *given, AUTO)
    assert again.code == 0
    assert (tmp_path / RESULT).stat().st_mtime_ns == before


@pytest.mark.slow
def test_chained_resumes_with_other_workers(whole: Run, given: list[str], tmp_path: Path) -> None:
    """After 2, 3 and 5 steps, with 0, 2, 4 and 1 workers; a resumed state resumes again."""
    for step, workers in ((2, 0), (3, 2), (5, 4)):
        more = ("--save_every_n_steps=1", "--save_state", f"--max_data_loader_n_workers={workers}", AUTO)
        train(tmp_path, *given, *more, f"--max_train_steps={step}", "--resume_allow_changes", "--lr_scheduler=constant")
    straight = train(tmp_path / "straight", *given, "--lr_scheduler=constant")
    run = train(tmp_path, *given, AUTO, "--max_data_loader_n_workers=1", "--lr_scheduler=constant")
    assert run.tensor_hash(RESULT) == straight.tensor_hash(RESULT)
    assert run.losses == straight.losses


def test_another_split_of_the_same_steps_goes_on(given: list[str], whole: Run, tmp_path: Path) -> None:
    """Batches of one, two of them a step: the same images in every step here, where all have one size."""
    single = write_dataset(tmp_path / "data", batch_size=1, more="shuffle_caption = true\nflip_aug = true")
    more = (f"--dataset_config={single}", "--gradient_accumulation_steps=2", f"--resume={state(whole, 5)}")
    run = train(tmp_path / "out", *given, *more)
    assert run.losses[0] == pytest.approx(whole.losses[5], rel=1e-4)


def test_a_drawn_seed_goes_on(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_network

    def run(output: Path, *more: str) -> Path:
        from tests.fresh import forget_accelerate

        forget_accelerate()
        assert train_network.main([*given, f"--output_dir={output}", *more]) == 0
        return output

    whole = run(tmp_path / "a", "--save_state", "--save_every_n_steps=3")
    resumed = run(tmp_path / "b", f"--resume={whole / 'thing-step00000003-state'}")
    first, second = load_file(whole / RESULT), load_file(resumed / RESULT)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("more", "losses"), [(["--initial_step=4"], 2), (["--initial_epoch=2"], 2)])
def test_a_run_begins_where_it_is_told_to(
    more: list[str], losses: int, whole: Run, given: list[str], tmp_path: Path
) -> None:
    """With fresh weights; data, rates and numbers are those of the step."""
    run = train(tmp_path, *given, *more, "--save_every_n_steps=1", "--skip_until_initial_step")
    assert len(run.losses) == losses
    assert read_scalars(tmp_path / "log", "lr/unet") == read_scalars(whole.folder / "log", "lr/unet")[4:]
    assert "thing-step00000005.safetensors" in run.files
    assert "thing-step00000004.safetensors" not in run.files


def test_a_given_step_wins_over_that_of_the_state(whole: Run, given: list[str], tmp_path: Path) -> None:
    run = train(tmp_path, *given, f"--resume={state(whole, 2)}", "--initial_step=5")
    assert read_scalars(tmp_path / "log", "lr/unet") == read_scalars(whole.folder / "log", "lr/unet")[5:]
    assert run.tensor_hash(RESULT) != whole.tensor_hash(RESULT)


@pytest.mark.parametrize("more", [["--initial_step=6"], ["--initial_epoch=9"]])
def test_a_beginning_behind_the_end_is_refused(more: list[str], given: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        train(tmp_path, *given, *more)


# --- what may change


def test_a_run_can_be_made_longer(
    whole: Run, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, *given, f"--resume={state(whole, 5)}", "--max_train_steps=8", "--save_every_n_epochs=1")
    straight = train(tmp_path / "straight", *given, "--max_train_steps=8")
    rates = read_scalars(tmp_path / "log", "lr/unet")
    assert "the run has 8 steps now; it had 6" in capsys.readouterr().err
    assert rates == pytest.approx(read_scalars(straight.folder / "log", "lr/unet")[5:])
    assert len(run.losses) == 3


def test_another_run_is_refused_with_every_difference(whole: Run, given: list[str], tmp_path: Path) -> None:
    more = write_dataset(tmp_path / "other", images=9, more="shuffle_caption = true")
    changed = ("--learning_rate=3e-3", "--seed=8", f"--dataset_config={more}", f"--resume={state(whole, 2)}")
    with pytest.raises(UserError) as caught:
        train(tmp_path, *given, *changed)
    told = str(caught.value)
    for part in ("--learning_rate: 0.01 -> 0.003", "--seed: 7 -> 8", "flip_aug: True -> False", "images and captions"):
        assert part in told
    assert not list(tmp_path.glob("*.safetensors"))


def test_allowed_changes_hold_from_here_on(
    whole: Run, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--learning_rate=3e-3", "--lr_scheduler=constant", "--optimizer_args", "weight_decay=0.5")
    run = train(tmp_path, *given, *more, f"--resume={state(whole, 2)}", "--resume_allow_changes", "--save_state")
    assert read_scalars(run.folder / "log", "lr/unet") == pytest.approx([3e-3] * 4)
    optimizer = torch.load(run.folder / "thing-state" / "optimizer.bin", weights_only=True)
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.5}
    assert "changed since the state was saved: --learning_rate: 0.01 -> 0.003" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--use_lion_optimizer"], ["--optimizer_type=SGDNesterov"]], ids=" ".join)
def test_another_optimizer_is_refused_in_any_case(
    more: list[str], whole: Run, given: list[str], tmp_path: Path
) -> None:
    """Lion has one moment, by the name of the first of AdamW: nothing in the state itself would stand against it."""
    with pytest.raises(UserError, match="the state is one of another optimizer: AdamW, and this run has"):
        train(tmp_path, *given, *more, f"--resume={state(whole, 2)}", "--resume_allow_changes")


def test_an_optimizer_by_its_own_name_is_the_same(whole: Run, given: list[str], tmp_path: Path) -> None:
    more = ["--optimizer_type=adamw", f"--resume={state(whole, 2)}", "--resume_allow_changes"]
    assert train(tmp_path, *given, *more).losses == whole.losses[2:]


def test_an_image_that_was_replaced_is_noticed(model: Path, tmp_path: Path) -> None:
    given = [*arguments(model, write_dataset(tmp_path), steps=2), NAMED, "--save_state", "--save_every_n_steps=1"]
    run = train(tmp_path / "out", *given)
    image = tmp_path / "images" / "03.png"
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(UserError, match="images and captions"):
        train(tmp_path / "again", *given, f"--resume={run.folder / 'thing-step00000001-state'}")


def test_another_base_model_is_noticed(whole: Run, given: list[str], tmp_path: Path) -> None:
    other = tiny_sd(tmp_path / "other", "sd1", layers_per_block=1)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, weights)
    more = (f"--pretrained_model_name_or_path={other}", f"--resume={state(whole, 2)}")
    with pytest.raises(UserError, match="the weights of the U-Net"):
        train(tmp_path / "out", *given, *more)


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_saves_model_and_state(
    number: int, code: int, whole: Run, given: list[str], tmp_path: Path, at_step: Callable[..., None]
) -> None:
    """Although no states are asked for; the step that was under way when the signal came is the last one."""
    at_step({2: send(number)})
    run = train(tmp_path, *given)
    assert run.code == code
    assert {name for name in run.files if not name.startswith("log/")} >= {
        "thing-step00000003.safetensors",
        "thing-step00000003-state/manifest.json",
    }
    assert run.tensor_hash("thing-step00000003.safetensors") == whole.tensor_hash("thing-step00000003.safetensors")
    at_step({})
    assert train(tmp_path, *given, AUTO).tensor_hash(RESULT) == whole.tensor_hash(RESULT)


def test_a_second_signal_stops_at_once(given: list[str], tmp_path: Path, at_step: Callable[..., None]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step({2: twice})
    with pytest.raises(KeyboardInterrupt, match="143"):
        train(tmp_path, *given)
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert left == {"log", "thing-report.html", "thing.run.json"}


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system does not know SIGUSR1")
def test_a_notice_of_preemption_saves_and_goes_on(
    whole: Run, given: list[str], tmp_path: Path, at_step: Callable[..., None]
) -> None:
    at_step({1: send(signal.SIGUSR1)})
    run = train(tmp_path, *given)
    assert run.code == 0
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    assert run.tensor_hash("thing-step00000002.safetensors") == whole.tensor_hash("thing-step00000002.safetensors")
    resumed = train(tmp_path / "again", *given, f"--resume={tmp_path / 'thing-step00000002-state'}")
    assert resumed.tensor_hash(RESULT) == whole.tensor_hash(RESULT)


def test_a_state_every_few_minutes(whole: Run, given: list[str], tmp_path: Path) -> None:
    """So few that one is due after every step; each takes the place of the one before."""
    run = train(tmp_path, *given, "--save_state_every_minutes=1e-6")
    assert json.loads((tmp_path / "thing-timed-state" / "train_state.json").read_text())["current_step"] == STEPS - 1
    assert [path.name for path in tmp_path.glob("*-state")] == ["thing-timed-state"]
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    assert train(tmp_path, *given, AUTO).losses == [*whole.losses, whole.losses[-1]]


# --- logs and previews


def test_log_and_previews_go_on_as_if_nothing_had_happened(
    given: list[str], tmp_path: Path, at_step: Callable[..., None]
) -> None:
    """Ended in step 5 by what leaves no time to save; the state of step 3 lacks what came after it."""

    class Killed(BaseException):
        pass

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n", encoding="utf-8")
    more = [*given, f"--sample_prompts={prompts}", "--sample_every_n_steps=3", "--save_state", "--save_every_n_steps=3"]
    whole = train(tmp_path / "whole", *more)

    def fail() -> None:
        raise Killed

    at_step({5: fail})
    with pytest.raises(Killed):
        train(tmp_path / "cut", *more)
    at_step({})
    run = train(tmp_path / "cut", *more, AUTO)

    def logged(folder: Path, tag: str) -> list[tuple[int, float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (session,) = [path.parent for path in list(folder.rglob("events*"))[:1]]
        events = EventAccumulator(str(session))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert len(list((tmp_path / "cut" / "log").iterdir())) == 1
    for tag in ("loss/current", "loss/average", "lr/unet"):
        assert logged(run.folder / "log", tag) == logged(whole.folder / "log", tag)

    def previews(folder: Path) -> list[str]:
        return sorted(path.name[:16] for path in (folder / "sample").glob("*.png"))

    assert previews(run.folder) == previews(whole.folder)

    def reported(folder: Path) -> tuple[str, int, str]:
        page = Page((folder / "thing-report.html").read_text(encoding="utf-8"))
        curve = next(value for tag, name, value in page.attributes if name == "data-values" and tag == "polyline")
        return curve, page.tags.count("img"), page.text

    (curve, pictures, _), (known, shown, text) = reported(whole.folder), reported(run.folder)
    assert (known, shown) == (curve, pictures)
    assert "The first 3 steps belong to an earlier part of the run." in text


def test_previews_that_a_stop_left_out_are_made_on_going_on(
    given: list[str], tmp_path: Path, at_step: Callable[..., None]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n", encoding="utf-8")
    more = [*given, f"--sample_prompts={prompts}", "--sample_every_n_steps=3"]
    at_step({2: send(signal.SIGTERM)})
    train(tmp_path / "out", *more)
    assert not (tmp_path / "out" / "sample").exists()
    at_step({})
    train(tmp_path / "out", *more, AUTO)
    assert [path.name[:12] for path in sorted((tmp_path / "out" / "sample").glob("*_00_*"))] == [
        "thing_000003",
        "thing_000006",
    ]


# --- states of other programs


def as_accelerate_writes(source: Path, folder: Path, *, step: bool = True) -> Path:
    """The state as the well-known scripts lay it out: no manifest, no fingerprint, generators as a pickle."""
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin"):
        shutil.copy(source / name, folder / name)
    (folder / "random_states_0.pkl").write_bytes(b"not read")
    if step:
        (folder / "train_state.json").write_text('{"current_epoch": 1, "current_step": 3}')
    return folder


@pytest.mark.parametrize("tells_step", [True, False])
def test_a_state_of_another_program_is_taken_over(
    tells_step: bool, whole: Run, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours without what only ours have: with the same seed, even the draws are the same here."""
    foreign = as_accelerate_writes(state(whole, 3), tmp_path / "foreign-state", step=tells_step)
    run = train(tmp_path / "out", *given, f"--resume={foreign}")
    assert "its weights and the optimizer's moments are taken over" in capsys.readouterr().err
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)


def test_a_foreign_optimizer_of_other_weights_begins_anew(
    whole: Run, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = as_accelerate_writes(state(whole, 3), tmp_path / "foreign-state")
    saved = torch.load(foreign / "optimizer.bin", weights_only=True)
    saved["state"][0]["exp_avg"] = torch.zeros(2, 2)
    torch.save(saved, foreign / "optimizer.bin")
    run = train(tmp_path / "out", *given, f"--resume={foreign}")
    assert "its moments begin anew" in capsys.readouterr().err
    assert len(run.losses) == STEPS - 3
