"""What is in a Diffusers folder, and what happens to one that is there already."""

import json
import re
from functools import cache

import pytest

from library.errors import UserError
from library.files import read_tensors
from library.models.formats import METADATA_FILE
from library.models.ldm_keys import text_to_sd1
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from tests.library.models.saving import METADATA, PARTS, assert_equal, load, save, trained, weights
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def base(tiny_folder, tiny_file):
    """``base("sd1", "folder")``: a loaded model, the same one for every test; not to be changed."""
    return cache(lambda kind, form: load(tiny_folder(kind) if form == "folder" else tiny_file(kind, form), kind))


@pytest.mark.parametrize(("form", "format"), [("folder", "diffusers_safetensors"), (".ckpt", "diffusers")])
def test_a_folder_has_these_files(base, tmp_path, form, format):
    path = save(tmp_path, base("sd1", form), format)
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    tokenizer = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    suffix = "bin" if format == "diffusers" else "safetensors"
    text = "pytorch_model.bin" if format == "diffusers" else "model.safetensors"
    assert found == {
        "model_index.json",
        METADATA_FILE,
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        f"text_encoder/{text}",
        "unet/config.json",
        f"unet/diffusion_pytorch_model.{suffix}",
        "vae/config.json",
        f"vae/diffusion_pytorch_model.{suffix}",
        *(f"tokenizer/{name}" for name in tokenizer | ({"tokenizer.json"} if form == ".ckpt" else set())),
    }
    assert json.loads((path / METADATA_FILE).read_text()) == METADATA
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    # Programs with older versions of transformers know the text encoder by these names alone.
    names = read_tensors(path / "text_encoder" / text).tensors.keys()
    assert names == text_to_sd1(load(path).text_encoder.state_dict()).keys()


def test_scheduler_and_tokenizer_of_the_source_folder_stay(tmp_path):
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    folder = tiny_sd(tmp_path / "base")
    scheduler = folder / "scheduler/scheduler_config.json"
    home = "/home/someone/models"
    PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True).save_pretrained(folder / "scheduler")
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"_name_or_path": home}))
    settings = folder / "tokenizer/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"name_or_path": home, "errors": "replace"}))
    for part in PARTS:
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": home}))

    path = save(tmp_path, load(folder), "diffusers_safetensors")

    pipeline = StableDiffusionPipeline.from_pretrained(str(path), local_files_only=True)
    assert type(pipeline.scheduler) is PNDMScheduler
    assert pipeline.scheduler.config.skip_prk_steps
    assert json.loads((path / "tokenizer/tokenizer_config.json").read_text())["errors"] == "replace"
    texts = [file.read_text() for file in path.rglob("*.json")]
    assert not [text for text in texts if home in text or str(tmp_path) in text]


@pytest.mark.parametrize("damage", ["removed", "unreadable"])
def test_a_folder_that_is_gone_costs_no_result(tmp_path, damage):
    folder = tiny_sd(tmp_path / "base", "sd2_v")
    model = load(folder, "sd2_v")
    if damage == "removed":
        folder.rename(tmp_path / "moved")
    else:
        for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
            (folder / name).write_text("{")

    path = save(tmp_path, model, "diffusers")

    again = load(path, "sd2_v")
    assert_equal(weights(again), weights(model))
    assert again.tokenizer("a cat")["input_ids"] == model.tokenizer("a cat")["input_ids"]
    config = json.loads((path / "scheduler/scheduler_config.json").read_text())
    assert (config["_class_name"], config["prediction_type"]) == ("DDIMScheduler", "v_prediction")


def test_the_prediction_that_was_trained_is_stated(tmp_path):
    """The source says epsilon; the run was told otherwise."""
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_sd(tmp_path / "base")), v_parameterization=True)
    path = save(tmp_path, load_stable_diffusion(options, PromptOptions()), "diffusers")
    assert json.loads((path / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_a_cut_off_save_leaves_the_former_folder(tiny_folder, tmp_path, monkeypatch):
    model = load(tiny_folder("sd1"))
    path = save(tmp_path, model, "diffusers")
    expected = {name: tensor.clone() for name, tensor in weights(model).items()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.models.diffusers_folder.write_json", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, trained(model), "diffusers")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert_equal(weights(load(path)), expected)


def test_a_folder_of_training_is_replaced(tiny_folder, tmp_path):
    model = load(tiny_folder("sd1"))
    path = save(tmp_path, model, "diffusers")
    save(tmp_path, trained(model), "diffusers_safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert not list(path.rglob("*.bin"))
    assert_equal(weights(load(path)), weights(model))


def test_a_folder_that_training_did_not_write_is_never_replaced(tmp_path):
    source = tiny_sd(tmp_path / "result")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="the new content is in result-") as error:
        save(tmp_path, trained(load(source)), "diffusers_safetensors")
    kept = re.search(r"result-[0-9a-f]{6}", str(error.value))[0]
    assert {entry.name for entry in tmp_path.iterdir()} == {"result", kept}
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
    assert load(tmp_path / kept)


@pytest.mark.parametrize(("kind", "size"), [("sd2", 64), ("sd2_v", 96)])
def test_an_sd2_of_512_pixels_says_so(tiny_file, tmp_path, kind, size):
    """Files of both sizes have the same weights, and the same configuration is read from them."""
    model = load(tiny_file(kind), kind)
    model.unet.register_to_config(sample_size=96)
    path = save(tmp_path, model, "diffusers")
    assert json.loads((path / "unet/config.json").read_text())["sample_size"] == size
