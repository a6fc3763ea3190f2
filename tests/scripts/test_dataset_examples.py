"""The documented dataset files train as they are written, with only their paths changed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from library.errors import UserError
from library.files import read_metadata
from tests.scripts.runs import Run, run_script, write_images
from tests.tiny import tiny_sd

EXAMPLES = sorted((Path(__file__).parents[1] / "golden" / "dataset_examples").glob("*.toml"))
_PATH = re.compile(r"'C:\\([^']*)'")
INVERSION = ("--token_string=zwx", "--init_word=dog", "--use_object_template")
SCRIPTS = {
    "train_network": ("--network_module=networks.lora", "--network_dim=4"),
    "train_db": ("--save_model_as=safetensors",),
    "fine_tune": ("--save_model_as=safetensors",),
    "train_textual_inversion": INVERSION,
    "train_textual_inversion_XTI": INVERSION,
}
USED = {"train_db": "124", "fine_tune": "3", "train_textual_inversion": "12345", "train_textual_inversion_XTI": "12345"}
"""The numbers of the examples that the other scripts can use."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrow and with a single head: at 512 pixels, attention takes nearly all the time."""
    folder = tmp_path_factory.mktemp("models") / "sd1"
    tiny_sd(folder, layers_per_block=1, channels=(8, 8, 8, 8), norm_groups=4)
    config = folder / "unet" / "config.json"
    # The number of heads, which is what this key holds, changes no weight's shape.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 1}))
    return folder


def folder_of_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    for caption in write_images(folder, count, size=size, seed=len(folder.name)).glob("*.txt"):
        caption.with_suffix(".caption").write_text(caption.read_text(encoding="utf-8"), encoding="utf-8")


def concept_and_regularisation(root: Path) -> None:
    folder_of_images(root / "hoge", 2, (512, 512))
    folder_of_images(root / "reg", 6, (512, 512))


def described(folder: Path, name: str, count: int, size: tuple[int, int]) -> None:
    folder_of_images(folder, count, size)
    entries = {path.stem: {"caption": "a thing", "tags": f"blue, {path.stem}"} for path in folder.glob("*.png")}
    (folder / name).write_text(json.dumps(entries), encoding="utf-8")


def fine_tuning(root: Path) -> None:
    described(root / "piyo", "piyo_md.json", 4, (512, 512))


def mixed(root: Path) -> None:
    for name in ("anna", "rex", "people"):
        folder_of_images(root / "photos" / name, 2, (512, 512))
    described(root / "paintings", "meta_lat.json", 2, (768, 512))


PREPARED: dict[str, tuple[Callable[[Path], None], list[dict[str, int]]]] = {
    # What fills the folders, and what an epoch then holds of each: images x repeats, regularisation balanced.
    "1": (concept_and_regularisation, [{"num_train_images": 20, "num_reg_images": 20}]),
    "2": (concept_and_regularisation, [{"num_train_images": 20, "num_reg_images": 20}]),
    "3": (fine_tuning, [{"num_train_images": 4, "num_reg_images": 0}]),
    "4": (concept_and_regularisation, [{"num_train_images": 20, "num_reg_images": 20}]),
    "5": (
        mixed,
        [{"num_train_images": 4, "num_reg_images": 4}, {"num_train_images": 2, "num_reg_images": 0}],
    ),
}


def with_own_paths(example: Path, root: Path) -> Path:
    """A copy of ``example`` whose paths lie below ``root``."""
    text = example.read_text(encoding="utf-8")
    dataset = root / example.name
    dataset.write_text(
        _PATH.sub(lambda match: f"'{(root / match[1].replace(chr(92), '/')).as_posix()}'", text), encoding="utf-8"
    )
    return dataset


def train(script: str, model: Path, dataset: Path, output: Path, *more: str) -> Run:
    return run_script(
        script,
        output,
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        *SCRIPTS[script],
        "--sdpa",
        "--max_train_steps=1",
        "--max_data_loader_n_workers=0",
        *more,
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_a_documented_dataset_file_trains(model: Path, example: Path, tmp_path: Path) -> None:
    prepare, wanted = PREPARED[example.stem[0]]
    prepare(tmp_path)
    run = train("train_network", model, with_own_paths(example, tmp_path), tmp_path / "out")
    assert run.code == 0
    (loss,) = run.losses
    assert 0 < loss < 10
    written = json.loads(read_metadata(run.folder / "last.safetensors")["ss_datasets"])
    assert [{name: one[name] for name in wanted[0]} for one in written] == wanted


@pytest.mark.parametrize(
    ("script", "number"),
    # An epoch of every kind of data once; at 512 pixels steps are slow, and the rest is planned without training.
    [("train_db", "2"), ("fine_tune", "3"), ("train_textual_inversion", "5")],
)
def test_other_scripts_train_on_what_they_can_use(script: str, number: str, model: Path, tmp_path: Path) -> None:
    prepare, _ = PREPARED[number]
    prepare(tmp_path)
    (example,) = (path for path in EXAMPLES if path.stem.startswith(number))
    run = train(script, model, with_own_paths(example, tmp_path), tmp_path / "out")
    assert run.code == 0
    assert 0 < run.losses[0] < 10
    assert any((run.folder / name).is_file() for name in ("last.safetensors", "zwx.pt"))


@pytest.mark.parametrize("number", "12345")
@pytest.mark.parametrize("script", USED)
def test_other_scripts_plan_what_they_can_use_and_refuse_the_rest(
    script: str, number: str, model: Path, tmp_path: Path
) -> None:
    prepare, _ = PREPARED[number]
    prepare(tmp_path)
    (example,) = (path for path in EXAMPLES if path.stem.startswith(number))
    dataset = with_own_paths(example, tmp_path)
    if number in USED[script]:
        assert train(script, model, dataset, tmp_path / "out", "--dry_run").code == 0
        return
    with pytest.raises(UserError, match="this method") as refused:
        train(script, model, dataset, tmp_path / "out", "--dry_run")
    assert all(problem.where and problem.remedy for problem in refused.value.problems)
