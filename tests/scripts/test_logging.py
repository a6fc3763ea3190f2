"""Logs and previews of a run through the script: both loggers, and the tags that users' dashboards know."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from tests.scripts.runs import read_scalars, run_script, write_dataset
from tests.tiny import tiny_sd

# A package of that name that writes down what it is told.
WANDB = """
import json
from pathlib import Path

RECORD = Path(__file__).with_name("record.jsonl")

def _note(what, **facts):
    with RECORD.open("a") as file:
        file.write(json.dumps({"what": what, **facts}) + "\\n")

def login(*, key):
    _note("login", key=key)

def init(**arguments):
    _note("init", **arguments)
    return Run()

class Image:
    def __init__(self, image, *, caption):
        self.facts = [*image.size, caption]

class Run:
    def log(self, figures, *, step):
        _note("log", step=step, figures={k: getattr(v, "facts", v) for k, v in figures.items()})

    def finish(self, *, exit_code):
        _note("finish", exit_code=exit_code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("model") / "base", layers_per_block=1, channels=(16, 16, 32, 32))


def given(model: Path, dataset: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--max_data_loader_n_workers=0",
        "--output_name=thing",
        *more,
    ]


def test_both_loggers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 1, "seed": 3}]')
    config = tmp_path / "trackers.toml"
    config.write_text('[wandb]\ntags = ["a"]\n')
    run = run_script(
        "train_network",
        tmp_path / "out",
        *given(model, write_dataset(tmp_path), "--network_module=networks.lora", "--max_train_steps=4"),
        *("--log_with=all", "--wandb_api_key=k3y-of-mine", "--wandb_run_name=first", f"--log_tracker_config={config}"),
        *("--log_config", "--log_tracker_name=dogs", "--log_prefix=before_"),
        *("--sample_at_first", "--sample_every_n_steps=4", f"--sample_prompts={prompts}"),
    )
    del sys.modules["wandb"]
    assert run.code == 0
    record = [json.loads(line) for line in (package / "record.jsonl").read_text().splitlines()]
    assert record[0] == {"what": "login", "key": "k3y-of-mine"}
    init = record[1]
    assert (init["project"], init["name"], init["tags"]) == ("dogs", "first", ["a"])
    assert init["config"]["max_train_steps"] == 4
    assert not {"wandb_api_key", "huggingface_token"} & set(init["config"])
    assert str(tmp_path) not in json.dumps(init["config"])
    assert record[-1] == {"what": "finish", "exit_code": 0}
    logged = [one for one in record if one["what"] == "log"]
    steps = [one["step"] for one in logged]
    assert steps == sorted(steps)
    assert [one["step"] for one in logged if "sample_0" in one["figures"]] == [0, 4]
    assert logged[0]["figures"] == {"sample_0": [64, 64, "a cat"]}
    losses = [one["figures"]["loss/current"] for one in logged if "loss/current" in one["figures"]]
    assert losses == pytest.approx(run.losses, rel=1e-6)
    (events,) = (tmp_path / "out" / "log").rglob("events*")
    assert events.parent.name == "dogs"
    assert events.parent.parent.name.startswith("before_")
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert b"k3y-of-mine" not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("script", "more", "tags"),
    [
        ("train_network", ["--network_module=networks.lora"], ["lr/unet", "lr/textencoder"]),
        ("train_db", ["--learning_rate_te=1e-6"], ["loss", "loss/epoch", "lr/unet", "lr/text_encoder1"]),
        ("fine_tune", [], ["loss", "loss/epoch", "lr/unet"]),
        (
            "train_textual_inversion",
            ["--token_string=zwx", "--init_word=cat", "--use_object_template"],
            ["loss", "loss/epoch", "lr"],
        ),
    ],
)
def test_tags_of_every_script(script: str, more: list[str], tags: list[str], model: Path, tmp_path: Path) -> None:
    arguments = given(model, write_dataset(tmp_path), "--max_train_steps=4", *more)
    if script == "fine_tune":
        metadata = tmp_path / "metadata.json"
        metadata.write_text(json.dumps({f"{number:02d}": {"caption": "a thing"} for number in range(8)}))
        images = [f"--train_data_dir={tmp_path / 'images'}", f"--in_json={metadata}", "--resolution=64"]
        arguments = [one for one in arguments if "dataset_config" not in one] + [*images, "--train_batch_size=2"]
    run = run_script(script, tmp_path / "out", *arguments)
    log = tmp_path / "out" / "log"
    everywhere = ["loss/current", "loss/average", "gradient_norm", "speed/images_per_second", "memory/peak_ram_gb"]
    for tag in (*everywhere, *(tag for tag in tags if tag != "loss/epoch")):
        assert len(read_scalars(log, tag)) == 4, tag
    if "loss" in tags:
        assert read_scalars(log, "loss") == run.losses
        assert read_scalars(log, "loss/epoch") == pytest.approx([sum(run.losses) / 4], rel=1e-5)
    assert read_scalars(log, "loss/epoch_average") == pytest.approx([sum(run.losses) / 4], rel=1e-5)


def test_a_missing_package_is_told_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match="pip install wandb"):
        run_script("fine_tune", tmp_path / "out", *given(model, write_dataset(tmp_path), "--log_with=wandb"))
    assert not list((tmp_path / "out").rglob("*"))
