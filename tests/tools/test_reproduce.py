"""``tools/reproduce.py``: a run is repeated from its manifest in other folders, and what changed is named."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from library.errors import UserError
from library.files import read_tensors, write_tensors
from tests.scripts.runs import Run, run_script, write_dataset
from tests.tiny import tiny_sd
from tools.reproduce import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images, prompts and the results of a run."""
    folder = tmp_path_factory.mktemp("original")
    model = tiny_sd(folder / "a base", layers_per_block=1, channels=(16, 16, 32, 32))
    (folder / "prompts.txt").write_text("a thing --w 64 --h 64 --s 2\n", encoding="utf-8")
    run = run_script(
        "train_network",
        folder / "out",
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={write_dataset(folder / 'data', more='shuffle_caption = true  # at home')}",
        "--network_module=networks.lora",
        "--network_dim=2",
        "--network_args",
        "conv_dim=2",
        "conv_alpha=1",
        "--learning_rate=1e-2",
        "--max_train_steps=3",
        "--save_every_n_steps=2",
        "--max_data_loader_n_workers=0",
        "--output_name=thing",
        f"--sample_prompts={folder / 'prompts.txt'}",
        "--sample_every_n_steps=3",
        "--training_comment=mine, in two words",
    )
    assert run.code == 0
    return folder


@pytest.fixture
def moved(original: Path, tmp_path: Path) -> Path:
    """The same somewhere else: manifest and results apart from model and images, no data set file, no prompts."""
    shutil.copytree(original / "a base", tmp_path / "elsewhere" / "base")
    shutil.copytree(original / "data" / "images", tmp_path / "elsewhere" / "pictures")
    shutil.copytree(original / "out", tmp_path / "results")
    return tmp_path


def asked(folder: Path, *more: str) -> list[str]:
    """The command line for what :func:`moved` has made."""
    maps = (f"--map=a base={folder / 'elsewhere' / 'base'}", "--map", f"images={folder / 'elsewhere' / 'pictures'}")
    return [str(folder / "results" / "thing.run.json"), *maps, *more]


def refusal(arguments: list[str]) -> str:
    with pytest.raises(UserError) as error:
        main(arguments)
    return str(error.value)


def test_a_moved_run_gives_the_same_tensors(moved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(asked(moved, f"--output_dir={moved / 'again'}")) == 0
    shown = capfd.readouterr().out
    assert "images, captions and models are as they were" in shown
    assert "equal: thing-step00000002.safetensors" in shown
    assert "the results are equal" in shown
    # Not by the tool's own hashes.
    for name in ("thing.safetensors", "thing-step00000002.safetensors"):
        again = Run(moved / "again", [], 0).tensor_hash(name)
        assert again == Run(moved / "results", [], 0).tensor_hash(name)
    assert len(list((moved / "again" / "sample").glob("*.png"))) == 1
    # The data set file of the repeated run tells where the images are.
    for path in (moved / "again").iterdir():
        assert path.is_dir() or str(moved).encode() not in path.read_bytes(), path.name


def test_other_results_are_told(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run itself is played here by a copy of the results with one number changed."""

    def play(command: list[str], *, threads: int) -> int:
        output = moved / "again"
        assert f"--output_dir={output}" in command
        shutil.copytree(moved / "results", output, dirs_exist_ok=True)
        path = output / "thing.safetensors"
        tensors = dict(read_tensors(path).tensors)
        name = sorted(tensors)[0]
        tensors[name] = tensors[name] + 0.25
        write_tensors(path, tensors)
        manifest = json.loads((output / "thing.run.json").read_text())
        manifest["results"]["thing.safetensors"]["tensors"] = "0" * 64
        (output / "thing.run.json").write_text(json.dumps(manifest))
        return 0

    monkeypatch.setattr("tools.reproduce._run", play)
    assert main(asked(moved, f"--output_dir={moved / 'again'}")) == 1
    shown = capsys.readouterr().out
    assert "DIFFERENT: thing.safetensors: at most 0.25 apart" in shown
    assert "equal: thing-step00000002.safetensors" in shown


def change_image(folder: Path) -> None:
    (folder / "pictures" / "03.png").write_bytes((folder / "pictures" / "04.png").read_bytes())


def change_caption(folder: Path) -> None:
    (folder / "pictures" / "05.txt").write_text("another", encoding="utf-8")


def add_image(folder: Path) -> None:
    shutil.copyfile(folder / "pictures" / "05.png", folder / "pictures" / "zz.png")


def remove_image(folder: Path) -> None:
    (folder / "pictures" / "06.png").unlink()


def change_model(folder: Path) -> None:
    path = folder / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    file = read_tensors(path)
    tensors = dict(file.tensors)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    write_tensors(path, tensors, metadata=file.metadata)


DEEP = '{"format": 1, "script": ' + "[" * 200 + "]" * 200 + "}"

CHANGES: dict[str, Callable[[Path], None]] = {
    "pictures/03.png: another image": change_image,
    "pictures/05.txt": change_caption,
    "pictures/zz.png: was not there": add_image,
    "pictures/06.png: is not there": remove_image,
    "a base: another unet/diffusion_pytorch_model.safetensors": change_model,
}


@pytest.mark.parametrize("told", CHANGES)
def test_what_changed_is_named_before_training(told: str, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHANGES[told](moved / "elsewhere")
    told = told.replace("05.txt", "05.png: another caption")
    assert told in refusal(asked(moved, f"--output_dir={moved / 'again'}"))
    assert not (moved / "again").exists()
    assert main(asked(moved, "--dry_run", "--anyway")) == 0
    assert f"not as it was: {told}" in capsys.readouterr().out


def test_all_changes_are_told_together(moved: Path) -> None:
    for change in CHANGES.values():
        change(moved / "elsewhere")
    said = refusal(asked(moved, "--dry_run"))
    assert "5 problems" in said
    assert said.count("not as it was") == 5


def test_everything_unmapped_is_told_with_its_flag(moved: Path) -> None:
    said = refusal([str(moved / "results" / "thing.run.json"), "--dry_run"])
    assert "2 problems" in said
    assert "Add --map 'a base=PATH OF THE FOLDER'" in said
    assert "Add --map 'images=PATH OF THE FOLDER'" in said


@pytest.mark.parametrize(
    ("given", "told"),
    [("image=x", "Did you mean images?"), ("images=/no/such", "there is no '/no/such'"), ("images", "there is no ''")],
)
def test_a_wrong_map_is_told(given: str, told: str, moved: Path) -> None:
    assert told in refusal(asked(moved, "--dry_run", f"--map={given}"))


def test_relative_places_are_found_from_the_same_folder(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(original / "a base", tmp_path / "base")
    shutil.copytree(original / "data" / "images", tmp_path / "pictures" / "1_thing")
    monkeypatch.chdir(tmp_path)
    given = ["--pretrained_model_name_or_path=base", "--train_data_dir=pictures", "--resolution=64", "--network_dim=2"]
    given += ["--network_module=networks.lora", "--max_train_steps=1", "--max_data_loader_n_workers=0"]
    run_script("train_network", Path("out"), *given, "--caption_extension=.txt")
    assert main(["out/run.json", "--dry_run"]) == 0
    os.rename("base", "other")
    assert "--map 'base=" in refusal(["out/run.json", "--dry_run"])


def test_a_dry_run_trains_nothing_and_shows_the_command(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(moved, "--dry_run")) == 0
    shown = capsys.readouterr().out
    assert "--learning_rate=0.01" in shown
    assert "--seed=7" in shown
    assert "'--training_comment=mine, in two words'" in shown
    assert "versions and processor are as they were" in shown
    assert set(moved.iterdir()) == {moved / "elsewhere", moved / "results"}


def test_other_versions_are_told(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = moved / "results" / "thing.run.json"
    manifest = json.loads(path.read_text())
    manifest["environment"]["packages"]["torch"] = "1.0"
    manifest["environment"]["gpu"] = "A GPU"
    path.write_text(json.dumps(manifest))
    assert main(asked(moved, "--dry_run")) == 0
    shown = capsys.readouterr().out
    assert "equal bytes cannot be promised: torch: 1.0, now" in shown
    assert "equal bytes cannot be promised: gpu: A GPU, now none" in shown
    assert "as they were" not in shown.replace("images, captions and models are as they were", "")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "script": 3}', "[" * 100_000, "\ud800", DEEP],
    ids=range(9),
)
def test_what_is_no_manifest_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "thing.run.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    refusal([str(path), "--dry_run"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("script", "../evil.py"),
        ("inputs", {"x": 3}),
        ("data", {}),
        ("results", {"a": 1}),
        ("parts", [{}]),
        ("steps", {}),
        ("options", {"no_such_option": 1}),
        ("options", {"learning_rate": {}}),
        ("processes", 0),
        ("environment", {"threads": "many"}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_damaged_manifests_are_refused(name: str, value: object, moved: Path) -> None:
    path = moved / "results" / "thing.run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refusal([*asked(moved)[:1], *(asked(moved)[1:] if name != "inputs" else []), "--dry_run"])


def test_a_folder_that_holds_something_is_no_place_for_results(moved: Path) -> None:
    assert "is not empty" in refusal(asked(moved, f"--output_dir={moved / 'results'}"))
    assert "there is no folder" in refusal(asked(moved))
    assert "no manifest is given" in refusal(["--dry_run"])


def test_the_documented_command_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```bash\n(python tools/reproduce\.py .*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said = refusal(shlex.split(command.replace("\\\n", " "))[2:])
    # All that is missing is the reader's manifest.
    assert said.startswith("file not found: rex.run.json")
