"""The manifest of runs that are stopped, fail, go on from a state, and of those that want none."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from tests.scripts.runs import run_script, tensor_hash, write_dataset, write_images
from tests.tiny import tiny_sd
from tools.reproduce import main as reproduce


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("given")
    model = tiny_sd(folder / "base", layers_per_block=1, channels=(16, 16, 32, 32))
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={write_dataset(folder)}",
        "--network_module=networks.lora",
        "--network_dim=2",
        "--learning_rate=1e-2",
        "--max_data_loader_n_workers=0",
        "--output_name=thing",
        "--save_state",
    ]


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "thing.run.json").read_text(encoding="utf-8"))
    return content


def places(given: list[str]) -> list[str]:
    model = Path(given[0].partition("=")[2])
    return [f"--map=base={model}", f"--map=images={model.parent / 'images'}"]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from networks.training import NetworkTraining

    def stop(self: NetworkTraining, done: int) -> dict[str, float]:
        if done == step:
            signal.raise_signal(signal.SIGINT)
        return {}

    monkeypatch.setattr(NetworkTraining, "after_step", stop)


def test_a_run_that_is_stopped_and_goes_on_twice(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert run_script("train_network", out, *given, "--max_train_steps=6").code == 130
    first = manifest(out)
    assert (first["outcome"], first["parts"]) == ("stopped", [])
    (state,) = first["states"]
    (saved,) = first["results"]
    done = first["steps"]["done"]
    assert state == f"thing-step{done:08d}-state"

    more = ["--max_train_steps=6", "--save_every_n_steps=4", f"--resume={out / state}"]
    assert run_script("train_network", out, *given, *more).code == 0
    second = manifest(out)
    assert second["outcome"] == "finished"
    assert [part["steps"] for part in second["parts"]] == [[0, done]]
    assert second["parts"][0]["outcome"] == "stopped"
    assert second["parts"][0]["changed_afterwards"] == []
    assert second["results"][saved] == first["results"][saved]
    assert {"thing-step00000004.safetensors", "thing.safetensors"} < second["results"].keys()

    # What was done after the state that the third part begins with belongs to the run no more.
    more = [
        "--max_train_steps=5",
        f"--resume={out / 'thing-step00000004-state'}",
        "--learning_rate=2e-2",
        "--resume_allow_changes",
    ]
    assert run_script("train_network", out, *given, *more).code == 0
    third = manifest(out)
    assert [part["steps"] for part in third["parts"]] == [[0, done], [done, 4]]
    assert third["parts"][1]["changed_afterwards"] == ["--learning_rate: 0.01 -> 0.02", "6 steps in all -> 5"]
    assert third["results"].keys() == {saved, "thing-step00000004.safetensors", "thing.safetensors"}
    for name, one in third["results"].items():
        assert one["tensors"] == tensor_hash(out / name)
    assert reproduce([str(out / "thing.run.json"), "--dry_run", *places(given)]) == 0
    assert "after step 4 the run was continued with changes (--learning_rate: 0.01 -> 0.02" in capsys.readouterr().out


def test_a_state_without_its_manifest_is_told(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("train_network", tmp_path / "a", *given, "--max_train_steps=1", "--no_manifest")
    assert not list((tmp_path / "a").glob("*.run.json"))
    more = ["--max_train_steps=2", f"--resume={tmp_path / 'a' / 'thing-state'}"]
    run_script("train_network", tmp_path / "b", *given, *more)
    assert manifest(tmp_path / "b")["parts"] == [{"outcome": "unknown", "steps": [0, 1]}]
    assert reproduce([str(tmp_path / "b" / "thing.run.json"), "--dry_run", *places(given)]) == 0
    assert "of the first 1 steps nothing is known" in capsys.readouterr().out


def test_a_run_that_fails(given: list[str], tmp_path: Path) -> None:
    more = ["--max_train_steps=20", "--max_grad_norm=0", "--learning_rate=1e18"]
    with pytest.raises(UserError, match="not finite"):
        run_script("train_network", tmp_path, *given, *more)
    left = manifest(tmp_path)
    assert left["outcome"] == "failed"
    assert left["results"].keys() == {f"thing-step{left['steps']['done']:08d}.safetensors"}


def test_a_mistake_before_the_first_step_leaves_none(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_script("train_network", tmp_path, *given, "--optimizer_args", "x=1")
    assert not list(tmp_path.rglob("*.run.json"))


def test_a_manifest_that_cannot_be_written_ends_no_run(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thing.run.json").mkdir()
    assert run_script("train_network", tmp_path, *given, "--max_train_steps=1").code == 0
    assert "the manifest could not be written" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
def test_names_of_files_that_are_no_text(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "data" / os.fsdecode(b"1_caf\xe9"), 2)
    for suffix in (".png", ".txt"):
        (images / f"00{suffix}").rename(images / os.fsdecode(b"\xff" + suffix.encode()))
    others = [one for one in given if not one.startswith("--dataset_config")]
    more = [
        f"--train_data_dir={tmp_path / 'data'}",
        "--resolution=64",
        "--caption_extension=.txt",
        "--max_train_steps=1",
    ]
    assert run_script("train_network", tmp_path / "out", *others, *more).code == 0
    assert manifest(tmp_path / "out")["outcome"] == "finished"
    assert (tmp_path / "out" / "thing-report.html").is_file()
    assert "could not be written" not in capsys.readouterr().err
