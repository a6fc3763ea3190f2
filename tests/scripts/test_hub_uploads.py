"""Runs of ``train_network.py`` that upload to a stand-in for the hub, and continue from a state on it."""

import functools
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.errors import UserError
from library.training.hub import uploads_to_hub
from library.training.uploads import Patience
from tests.hub_stand_in import TOKEN, Faults, StandIn, running, used_by_this_process
from tests.scripts.runs import Run, run_script, tensor_hash, write_dataset
from tests.scripts.test_train_network import arguments
from tests.tiny import tiny_sd

QUICK = Patience(first=0.01, longest=0.05, one=5, save=5, end=5)
REPO = ["--huggingface_repo_id=owner/thing", f"--huggingface_token={TOKEN}", "--huggingface_path_in_repo=runs/one"]
EVERY_STEP = ["--save_every_n_steps=1", "--ema", "--output_name=thing"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("hub-runs")
    return arguments(tiny_sd(folder / "sd1", "sd1", layers_per_block=1), write_dataset(folder), steps=9)


@pytest.fixture(scope="module")
def plain(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that uploads nothing: 9 steps, each saved with its average, and the two final files."""
    return run_script("train_network", tmp_path_factory.mktemp("plain"), *given, *EVERY_STEP)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("library.hooks.uploads_to_hub", functools.partial(uploads_to_hub, patience=QUICK))
    with running() as stand_in, used_by_this_process(stand_in, str(tmp_path / "hub-cache")):
        yield stand_in


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of the saved files, by path in the repository."""
    return {
        f"runs/one/{name}": hashlib.sha256((run.folder / name).read_bytes()).hexdigest()
        for name in run.files
        if name.endswith(".safetensors") or "-state/" in name
    }


@pytest.mark.parametrize("more", [[], ["--async_upload"]], ids=["one after the other", "beside training"])
def test_twenty_uploads_with_faults_leave_training_as_it_is(
    more: list[str], hub: StandIn, given: list[str], plain: Run, tmp_path: Path
) -> None:
    log = [f"--console_log_file={tmp_path / 'log.txt'}", "--console_log_level=DEBUG"]
    hub.faults = Faults(rate=0.2, slow=0.2, seconds=0.02)
    run = run_script("train_network", tmp_path / "out", *given, *EVERY_STEP, *REPO, *more, *log)
    assert run.code == 0
    assert hub.faulty > 10
    saved = digests(run)
    assert len(saved) == 20
    assert hub.files == saved, "every saved file, and nothing else"
    assert len(hub.committed) == len(saved)
    assert not hub.sent_again
    told = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "uploaded: 20" in told
    assert "not uploaded: " not in told
    assert run.losses == plain.losses
    for name in ("thing.safetensors", "thing-ema.safetensors", "thing-step00000004.safetensors"):
        assert run.tensor_hash(name) == tensor_hash(plain.folder / name)
    assert TOKEN not in told
    for name in run.files:
        assert TOKEN.encode() not in (run.folder / name).read_bytes(), name
    for content in hub.repos["model", "owner/thing"].files.values():
        assert TOKEN.encode() not in content


def test_a_hub_that_takes_nothing_is_no_end_of_the_run(
    hub: StandIn, given: list[str], plain: Run, tmp_path: Path
) -> None:
    log = f"--console_log_file={tmp_path / 'log.txt'}"
    hub.faults = Faults(fails=lambda method, path: method != "GET")
    with pytest.MonkeyPatch.context() as patch:
        short = Patience(first=0.01, longest=0.02, one=0.1, save=0.1, end=0.2)
        patch.setattr("library.hooks.uploads_to_hub", functools.partial(uploads_to_hub, patience=short))
        run = run_script("train_network", tmp_path / "out", *given, "--save_every_n_steps=4", *REPO, log)
    assert run.code == 0
    assert run.tensor_hash() == plain.tensor_hash("thing.safetensors")
    final = (tmp_path / "log.txt").read_text(encoding="utf-8").split("waiting for uploads")[-1]
    for name in ("at-step00000004.safetensors", "at-step00000008.safetensors", "last.safetensors"):
        assert (run.folder / name).exists()
        assert f"{name} (" in final


def test_removed_files_arrive_and_stay_on_the_hub_and_states_continue_from_there(
    hub: StandIn, given: list[str], plain: Run, tmp_path: Path
) -> None:
    saving = ["--save_every_n_steps=3", "--save_last_n_steps=1", "--save_state", "--save_state_to_huggingface"]
    hub.faults = Faults(slow=0.3, seconds=0.05)
    run = run_script("train_network", tmp_path / "out", *given, "--output_name=thing", *saving, *REPO, "--async_upload")
    assert {name.split("/")[0] for name in run.files if name.endswith(".safetensors")} == {
        *("thing-step00000009.safetensors", "thing-step00000009-state", "thing.safetensors", "thing-state")
    }
    folders = {path.split("/")[2] for path in hub.files}
    assert folders == {
        *(f"thing-step{step:08d}.safetensors" for step in (3, 6, 9)),
        *(f"thing-step{step:08d}-state" for step in (3, 6, 9)),
        *("thing.safetensors", "thing-state"),
    }
    assert digests(run).items() <= hub.files.items()

    state = "owner/thing/runs/one/thing-step00000003-state"
    again = run_script(
        "train_network",
        tmp_path / "again",
        *given,
        f"--resume={state}",
        "--resume_from_huggingface",
        f"--huggingface_token={TOKEN}",
    )
    assert again.losses == plain.losses[3:]
    assert again.tensor_hash() == plain.tensor_hash("thing.safetensors")


def test_mistakes_are_found_before_the_model_is_loaded(
    hub: StandIn, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("library.models.stable_diffusion.load_stable_diffusion", loaded)
    token = f"--huggingface_token={TOKEN}"
    for more, says in (
        (["--huggingface_repo_id=owner/thing", "--huggingface_token=hf_wrong"], "the access token is refused"),
        (["--huggingface_repo_id=thing"], "thing is no repository"),
        (["--resume=owner/thing/none-state", "--resume_from_huggingface", token], "it is not there"),
        (["--resume=here", "--resume_from_huggingface", token], "here is no state on the hub"),
        (["--resume_from_huggingface", token], "needs to be told which state"),
    ):
        with pytest.raises(UserError, match=says):
            run_script("train_network", tmp_path / "out", *given, *more)
    hub.requests.clear()
    assert run_script("train_network", tmp_path / "out", *given, *REPO, "--dry_run").code == 0
    assert not hub.requests, "a dry run asks nobody"


def test_an_interrupted_run_uploads_what_it_has_saved(hub: StandIn, given: list[str], tmp_path: Path) -> None:
    hub.faults = Faults(slow=1, seconds=0.05)
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.01):
            if len(hub.acknowledged) >= 2:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watch = threading.Thread(target=interrupt)
    watch.start()
    try:
        more = ["--max_train_steps=2000", "--output_name=thing", "--save_every_n_steps=2", "--async_upload"]
        run = run_script("train_network", tmp_path / "out", *given, *more, *REPO)
    finally:
        ended.set()
        watch.join()
    assert run.code == 130
    # The state that it leaves stays here: --save_state_to_huggingface is not given.
    models = {path: digest for path, digest in digests(run).items() if "-state/" not in path}
    assert len(models) > 2
    assert len(digests(run)) > len(models)
    assert hub.files == models
    assert not hub.sent_again
