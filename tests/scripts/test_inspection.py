"""``--dry_run``, ``--validate_dataset`` and ``--debug_dataset``: looking without training."""

import json
from pathlib import Path

import pytest
from PIL import Image

import train_network
from library.errors import UserError
from tests.scripts.runs import run_script, write_dataset
from tests.scripts.test_bad_input import in_a_process
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


def given(model: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--max_data_loader_n_workers=0",
        f"--output_dir={output}",
        *more,
    ]


def test_a_dry_run_shows_the_plan_without_anything_heavy(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = given(model, write_dataset(tmp_path), output, "--max_train_epochs=3", "--save_every_n_epochs=1")
    done = in_a_process(*arguments, "--dry_run", "--seed=7")
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert not output.exists()
    for line in (
        "  images: 8 images x 1 repeats; 8 captions found (.txt)",
        "  bucket 0: resolution (64, 64), count: 8; nothing cropped",
        "  00.png: a thing, number 0",
        "  an epoch: 4 batches / (1 accumulated x 1 processes) = 4 steps",
        "  the run: 3 epochs x 4 steps = 12 steps",
        "  models: epoch-000001.safetensors, epoch-000002.safetensors, last.safetensors (3 saved)",
        "dry run: nothing was trained",
    ):
        assert line in done.stdout.splitlines()


def test_the_plan_is_what_is_done(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run names exactly the models that the run writes, and their size."""
    more = ["--max_train_steps=6", "--save_every_n_steps=2", "--save_last_n_steps=2", "--save_precision=fp16"]
    dataset = write_dataset(tmp_path / "data")
    output = tmp_path / "out"
    assert train_network.main([*given(model, dataset, output), *more, "--dry_run", "--seed=7"]) == 0
    screen = capsys.readouterr().out
    run_script("train_network", output, *given(model, dataset, output), *more)
    written = {path.name for path in output.glob("*.safetensors")}
    assert "(4 saved, 3 stay)" in screen
    assert written == {"at-step00000004.safetensors", "at-step00000006.safetensors", "last.safetensors"}
    for name in written:
        assert name in screen


def test_a_dry_run_says_that_fp16_needs_a_gpu(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "on this computer the run would be refused"
    arguments = [
        *given(model, write_dataset(tmp_path / "data"), tmp_path / "out"),
        "--dry_run",
        "--mixed_precision=fp16",
    ]
    monkeypatch.setattr("library.inspection.has_gpu", lambda: False)
    assert train_network.main(arguments) == 0
    assert told in capsys.readouterr().out
    monkeypatch.setattr("library.inspection.has_gpu", lambda: True)
    assert train_network.main(arguments) == 0
    assert told not in capsys.readouterr().out


def test_a_dry_run_is_refused_as_the_run_would_be(model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    (tmp_path / "data" / "images" / "03.png").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        train_network.main([*given(model.with_name("none"), dataset, tmp_path / "out"), "--dry_run"])
    assert "03.png" in str(error.value)
    assert "none" in str(error.value)


def test_validation_is_pure_json_with_an_exit_code(tmp_path: Path) -> None:
    """No model is named, and nothing but the report is on the standard output."""
    dataset = write_dataset(tmp_path)
    (tmp_path / "images" / "03.txt").write_bytes(b"caf\xe9")
    done = in_a_process(f"--dataset_config={dataset}", "--validate_dataset=json")
    assert done.returncode == 2
    report, _, heavy = done.stdout.partition("HEAVY ")
    assert heavy.strip() == "[]"
    content = json.loads(report)
    assert content["images"] == 8
    assert content["errors"] == 1
    (finding,) = [finding for finding in content["findings"] if finding["severity"] == "error"]
    assert set(finding) == {"severity", "what", "where", "remedy"}
    assert finding["where"].endswith("03.txt")


def test_validation_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path)
    assert train_network.main([f"--dataset_config={dataset}", "--validate_dataset=text"]) == 0
    assert capsys.readouterr().out == "8 images: 0 errors, 0 warnings\n"
    (tmp_path / "images" / "03.png").write_bytes(b"")
    assert train_network.main([f"--dataset_config={dataset}", "--validate_dataset=text"]) == 2
    told = capsys.readouterr().out
    assert told.startswith("error: the image cannot be read")
    assert "remedy: " in told


def test_debug_dataset_writes_pictures_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path)
    output = tmp_path / "out"
    assert train_network.main([f"--dataset_config={dataset}", "--debug_dataset", f"--output_dir={output}"]) == 0
    assert {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()} == {
        "dataset_preview/index.html",
        "dataset_preview/epoch-01-sheet-001.png",
        "dataset_preview/epoch-02-sheet-001.png",
    }
    assert "index.html" in capsys.readouterr().out
    Image.open(output / "dataset_preview" / "epoch-01-sheet-001.png").verify()


def test_debug_dataset_without_an_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert train_network.main([f"--dataset_config={dataset}", "--debug_dataset"]) == 0
    assert (tmp_path / "dataset_preview" / "index.html").is_file()


def test_debug_dataset_with_a_mistake(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    (tmp_path / "images" / "03.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        train_network.main([f"--dataset_config={dataset}", "--debug_dataset", f"--output_dir={tmp_path / 'out'}"])
