"""What a manifest tells of options, data set and prompts, and that the same run comes of it again."""

import importlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from library.data.config import read_spec
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions
from library.options import flat_values, parse_options
from library.provenance import content_of, hub_models, told_dataset, told_inputs, told_options
from library.reproduction import SUPPORT, arguments_of, places_of
from library.scrubbing import Scrubber
from library.training.placeholders import Placeholders, filled_in
from library.training.prompt_files import as_table, load_prompts

SECRET = "CANARY"


def options_of(script, words):
    kind = importlib.import_module(script).Options
    return parse_options(kind, words, prog=script, description="", announce=lambda text: None)


def own(script, place):
    if script == "train_network":
        files = [str(place / name) for name in ("a.safetensors", "b.safetensors")]
        return [
            *(
                "--network_module=networks.lora",
                f"--network_weights={place / 'a.safetensors'}",
                "--base_weights",
                *files,
            ),
            f"--training_comment=my images from {place}/x, and 1/2 = 0.5",
            *("--base_weights_multiplier", "0.5", "1", "--network_args", "conv_dim=4", f"x={place / 'b.safetensors'}"),
        ]
    if script.startswith("train_textual"):
        return ["--token_string=zwx", f"--weights={place / 'a.safetensors'}"]
    return ["--stop_text_encoder_training=3"] if script == "train_db" else ["--block_lr=" + ",".join(["1e-5"] * 23)]


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / f"of {SECRET}" / "inner"
    for name in ("a.safetensors", "b.safetensors", "vae.pt", "meta.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "images").mkdir()
    return folder


@pytest.mark.parametrize("script", [name.removesuffix(".py") for name in SUPPORT])
def test_the_told_options_make_the_same_run(script, place):
    words = [
        f"--pretrained_model_name_or_path={place / 'a.safetensors'}",
        f"--train_data_dir={place / 'images'}",
        f"--tokenizer_cache_dir={place}",
        "--resolution=512,768",
        "--face_crop_aug_range=1,2",
        "--learning_rate=1.25e-7",
        "--lr_warmup_steps=10%",
        "--enable_bucket",
        "--caption_separator=; -",
        "--optimizer_args",
        "weight_decay=0.01",
        "betas=0.9,0.99",
        "--max_train_epochs=3",
        f"--output_dir={place / 'out'}",
        f"--logging_dir={place / 'log'}",
        f"--huggingface_token={SECRET}",
        f"--huggingface_repo_id={SECRET}/models",
        f"--wandb_api_key={SECRET}",
        *own(script, place),
    ]
    options = options_of(script, words)
    names = Placeholders()
    told = told_options(options, names, Scrubber([place]))
    assert SECRET not in json.dumps(told)
    assert told["pretrained_model_name_or_path"] == "map:a.safetensors"
    assert told["output_dir"] == "out"
    assert told["lr_warmup_steps"] == 0.1

    inputs = {one.name: {"is": "file", "used_as": one.uses, "path": None} for one in names}
    manifest = {"options": told, "inputs": inputs, "seed": 5, "dataset": None, "prompts": []}
    places = places_of(manifest, [f"{one.name}={one.place}" for one in names])
    again = options_of(script, arguments_of(manifest, places, inputs=place, output_dir=place / "new"))
    before, after = flat_values(options), flat_values(again)
    changed = {name for name in before if before[name] != after[name]}
    account = {"huggingface_token", "huggingface_repo_id", "wandb_api_key"}
    assert changed - {"training_comment"} == {"output_dir", "seed", "logging_dir", *account}
    assert (
        told.get("training_comment", "my images from inner/x, and 1/2 = 0.5") == "my images from inner/x, and 1/2 = 0.5"
    )


def test_models_of_the_hub_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    options = options_of("train_network", ["--pretrained_model_name_or_path=someone/model", "--network_module=a.b"])
    names = Placeholders()
    told = told_options(options, names, Scrubber())
    assert told["pretrained_model_name_or_path"] == "someone/model"
    (hub,) = told_inputs(names, hub_models(told)).items()
    assert hub == ("someone/model", {"is": "hub model", "used_as": ["--pretrained_model_name_or_path"], "files": {}})
    assert places_of({"inputs": dict([hub])}, []) == {}


DATASET = """
[general]   # of CANARY
enable_bucket = true
caption_extension = ".txt"

[[datasets]]
resolution = [512, 768]
batch_size = 2
min_bucket_reso = 128
  [[datasets.subsets]]
  image_dir = '{}/images'
  class_tokens = "a dog"
  num_repeats = 3
  conditioning_data_dir = '{}/masks'
  [datasets.subsets.custom_attributes]
  when = 1979-05-27
  where = "{}/x"
  [[datasets.subsets]]
  image_dir = 'reg'
  is_reg = true
  face_crop_aug_range = [1.0, 2.0]
"""


def without_places(value):
    """A specification without where in the file each part stands."""
    if is_dataclass(value):
        return {item.name: without_places(getattr(value, item.name)) for item in fields(value) if item.name != "where"}
    if isinstance(value, tuple | list):
        return [without_places(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def test_a_data_set_file_is_told_without_paths_and_comments(place):
    for name in ("masks", "reg"):
        (place / name).mkdir()
    file = place / "dataset.toml"
    file.write_text(DATASET.replace("{}", str(place)), encoding="utf-8")
    names = Placeholders()
    told = told_dataset(file, names, Scrubber([place]))
    assert SECRET not in json.dumps(told)
    first, second = told["datasets"][0]["subsets"]
    assert (first["image_dir"], second["image_dir"]) == ("map:images", "map:reg")
    assert first["custom_attributes"]["when"] == "1979-05-27"

    (place / "again").mkdir()
    again = place / "again" / "dataset.json"
    again.write_text(json.dumps(filled_in(told, {one.name: str(one.place) for one in names})), encoding="utf-8")
    specs = [
        read_spec(
            SourceOptions(dataset_config=path, masked_loss=True), ImageOptions(), CaptionOptions(), CacheOptions()
        )
        for path in (file, again)
    ]
    for _, findings in specs:
        assert not [finding for finding in findings if finding.severity == "error"], findings
    old, new = (without_places(spec) for spec, _ in specs)
    for spec in (old, new):
        for subset in spec["datasets"][0]["subsets"]:
            # A date has become text, and a path its last part.
            subset["custom_attributes"] = subset["written_dir"] = None
            subset["image_dir"] = Path(subset["image_dir"]).name
    assert old == new


def test_prompts_are_the_same_again(tmp_path):
    lines = 'a cat --n blurry --w 512 --h 768 --s 28 --l 7 --d 0 --ss euler_a\na "dog" \\ (x:1.2)\n'
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    prompts = load_prompts(tmp_path / "a.txt", default_sampler="heun")
    (tmp_path / "b.json").write_text(json.dumps([as_table(prompt) for prompt in prompts]), encoding="utf-8")
    assert load_prompts(tmp_path / "b.json") == prompts


def test_what_is_read_of_an_input_is_hashed(place):
    assert content_of(["image_dir"], str(place)) == {}
    assert content_of(["--in_json"], str(place / "meta.json")) == {}
    assert set(content_of(["--network_weights"], str(place / "a.safetensors"))) == {"sha256"}
    assert len(content_of(["--tokenizer_cache_dir"], str(place))["files"]) == 4
