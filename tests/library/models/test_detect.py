"""Finding out what a model path is: the right kinds, and every usual mistake, without loading anything."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import save_file

from library.errors import UserError
from library.models.detect import check_model_source, describe_source, describe_vae, weight_file
from library.models.options import ModelOptions, PromptOptions
from library.models.recognise import tensor_names

ROOT = Path(__file__).parents[3]


def problems(source, *, prompts=None, **options):
    options = ModelOptions(pretrained_model_name_or_path=source and str(source), **options)
    return check_model_source(options, prompts or PromptOptions()).problems


def only(found):
    (problem,) = found
    return problem


def weights(path, *names):
    save_file({name: numpy.zeros((2, 2), numpy.float32) for name in names}, path)
    return path


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sd2_v"])
@pytest.mark.parametrize("form", ["folder", ".safetensors", ".ckpt"])
def test_the_family_is_known_without_loading(tiny_folder, tiny_file, kind, form):
    source = tiny_folder(kind) if form == "folder" else tiny_file(kind, form)

    facts = describe_source(str(source))

    assert facts.kind == ("folder" if form == "folder" else "file")
    assert facts.name == source.name
    assert facts.family == kind[:3]
    assert facts.text_width == (None if form == ".ckpt" else {"sd1": 64, "sd2": 96}[kind[:3]])
    assert facts.in_channels == (None if form == ".ckpt" else 4)
    assert facts.prediction == (None if form != "folder" else "v_prediction" if kind == "sd2_v" else "epsilon")
    assert problems(source, v2=kind != "sd1") == ()


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2")])
def test_the_text_encoders_width_tells_the_family_of_a_folder(tiny_folder, tmp_path, width, family):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    # Some folders leave the activation out.
    del config["hidden_act"]
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_size": width}))
    assert describe_source(str(folder)).family == family


@pytest.mark.parametrize("form", ["folder", ".safetensors", ".ckpt"])
def test_sd2_without_v2_and_sd1_with_it_are_refused(tiny_folder, tiny_file, form):
    sd1, sd2 = (tiny_folder(kind) if form == "folder" else tiny_file(kind, form) for kind in ("sd1", "sd2"))

    wrong = only(problems(sd2))
    assert f"{sd2.name} is a Stable Diffusion 2.x model" in wrong.what
    assert "Add --v2" in wrong.remedy

    wrong = only(problems(sd1, v2=True))
    assert f"{sd1.name} is a Stable Diffusion 1.x model" in wrong.what
    assert wrong.remedy == "Leave out --v2."


def test_a_folders_prediction_type_is_compared_with_the_flag(tiny_folder):
    def notices(kind, **options):
        options = ModelOptions(pretrained_model_name_or_path=str(tiny_folder(kind)), **options)
        return check_model_source(options, PromptOptions()).notices

    (notice,) = notices("sd2_v", v2=True)
    assert "predicts velocity, but --v_parameterization is not given" in notice
    (notice,) = notices("sd1", v_parameterization=True)
    assert "predicts noise (epsilon), but --v_parameterization is given" in notice
    assert notices("sd2_v", v2=True, v_parameterization=True) == ()


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None),
        ({}, None),
    ],
)
def test_a_files_metadata_may_tell_the_prediction(tmp_path, metadata, prediction):
    names = ("model.diffusion_model.a", "cond_stage_model.model.b")
    save_file({name: numpy.zeros(1, numpy.float32) for name in names}, tmp_path / "m.safetensors", metadata=metadata)
    assert describe_source(str(tmp_path / "m.safetensors")).prediction == prediction


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "LoRA"),
        (["unet.mid_block.attentions.0.to_q.lora_A.weight"], "LoRA"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "VAE alone"),
        (["first_stage_model.encoder.conv_in.weight"], "VAE alone"),
        (["model.diffusion_model.a", "conditioner.embedders.0.b"], "SDXL"),
        (["model.diffusion_model.joint_blocks.0.a"], "SD3"),
        (["double_blocks.0.a"], "Flux"),
        (["control_model.a"], "ControlNet"),
        (["emb_params"], "textual inversion"),
        (["model.diffusion_model.a"], "no text encoder"),
        (["text_model.encoder.a"], "text encoder alone"),
        (["layer.one", "layer.two"], "layer.one, layer.two"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, names, said):
    problem = only(problems(weights(tmp_path / "m.safetensors", *names)))
    assert said in problem.what
    assert "m.safetensors" in problem.where
    assert "Stable Diffusion 1.x or 2.x" in problem.remedy


def test_a_lora_in_a_torch_file_is_named_without_running_the_pickle(tmp_path):
    torch.save({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.ckpt")
    assert "LoRA" in only(problems(tmp_path / "lora.ckpt")).what


def test_a_part_of_a_folder_leads_to_the_folder(tiny_folder):
    folder = tiny_folder("sd1")
    problem = only(problems(folder / "unet/diffusion_pytorch_model.safetensors"))
    assert "U-Net of a Diffusers folder" in problem.what
    assert str(folder) in problem.remedy
    problem = only(problems(folder / "unet"))
    assert "unet/config.json" in problem.what
    assert problem.remedy == f"Give the folder above it: {folder}"
    problem = only(problems(folder.parent))
    assert problem.remedy.startswith("Give the folder inside it:")


def test_a_folder_with_a_checkpoint_leads_to_the_checkpoint(tmp_path):
    weights(tmp_path / "sd15.safetensors", "a")
    assert only(problems(tmp_path)).remedy == f"Give the file itself: {tmp_path / 'sd15.safetensors'}"


@pytest.mark.parametrize(
    ("index", "extra"),
    [({"_class_name": "StableDiffusionXLPipeline"}, None), ({}, "text_encoder_2"), ({}, "transformer")],
)
def test_a_folder_of_another_kind_is_named(tiny_folder, tmp_path, index, extra):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    (folder / "model_index.json").write_text(json.dumps(index))
    if extra:
        (folder / extra).mkdir()
    assert "another kind" in only(problems(folder)).what


def test_an_incomplete_folder_says_what_is_missing(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    problem = only(problems(folder))
    assert "no weights in the folder vae" in problem.what
    assert "diffusion_pytorch_model.safetensors" in problem.remedy
    (folder / "unet/config.json").write_text("{")
    assert "config.json" in only(problems(folder)).what


def test_damaged_and_wrong_files_are_reported(tmp_path, tiny_file):
    whole = tiny_file("sd1").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:1000])
    assert "not a readable safetensors file" in only(problems(tmp_path / "cut.safetensors")).what
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    assert "page.ckpt is not a model file" in only(problems(tmp_path / "page.ckpt")).what
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    assert problems(tmp_path / "cut.ckpt") == (), "only loading can tell"
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert tensor_names(tmp_path / "other.ckpt") == {}


def test_a_missing_path_names_its_neighbours(tmp_path):
    weights(tmp_path / "model-v15.safetensors", "a")
    problem = only(problems(tmp_path / "model-v15.safetensor"))
    assert "no such file or folder" in problem.what
    assert problem.remedy == "Did you mean model-v15.safetensors?"
    assert only(problems(tmp_path / "model-v15")).remedy == "Did you mean model-v15.safetensors?"
    assert "does not exist" in only(problems(tmp_path / "nowhere" / "deep" / "model.ckpt")).remedy
    assert "nothing of that name" in only(problems(tmp_path / "zzz.ckpt")).remedy


def test_a_hub_id_is_no_missing_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert describe_source("owner/model").kind == "hub"
    assert problems("owner/model", v2=True) == ()
    assert "no such file" in only(problems("models/sd15")).what, "the folder exists, so it is a path"
    assert "no such file" in only(problems("owner/model.safetensors")).what
    assert "no such file" in only(problems("sd15")).what
    assert "no base model" in only(problems(None)).what


def test_the_home_folder_is_understood(tiny_folder, monkeypatch):
    folder = tiny_folder("sd1")
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert describe_source(f"~/{folder.name}").path == folder


def test_an_inpainting_model_is_refused_for_training(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    assert "9 input channels" in only(problems(folder)).what


def test_a_vae_is_checked_with_the_model_and_all_problems_are_found(tiny_folder, tmp_path):
    lora = weights(tmp_path / "lora.safetensors", "lora_te_x.lora_up.weight")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    found = problems(tiny_folder("sd2"), vae=str(lora), prompts=PromptOptions(tokenizer_cache_dir=tmp_path / "file"))
    assert [problem.where.split()[0] for problem in found] == [
        "--pretrained_model_name_or_path",
        "--vae",
        "--tokenizer_cache_dir",
    ]
    assert "LoRA" in found[1].what
    assert "it is empty" in only(problems(tiny_folder("sd1"), vae=str(tmp_path / "empty"))).what
    assert "no such file" in only(problems(tiny_folder("sd1"), vae=str(tmp_path / "vae.pt"))).what


def test_a_folder_without_weights_is_described_by_a_few_of_its_names(tiny_folder, tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.txt").touch()
    said = "it has a.txt, b.txt, c.txt, d.txt, e.txt"
    assert f"({said})" in only(problems(tiny_folder("sd1"), vae=str(tmp_path))).what
    (tmp_path / "f").mkdir()
    (tmp_path / "g").mkdir()
    assert f"({said} and 2 more)" in only(problems(tiny_folder("sd1"), vae=str(tmp_path))).what


def test_every_form_of_vae_is_accepted(tiny_folder, tiny_file):
    folder = tiny_folder("sd1")
    assert describe_vae(str(folder)) == folder / "vae"
    assert describe_vae(str(folder / "vae")) == folder / "vae"
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    assert describe_vae(str(file)) == file
    assert describe_vae(str(tiny_file("sd2", ".ckpt"))) == tiny_file("sd2", ".ckpt")
    assert describe_vae("stabilityai/sd-vae-ft-mse") is None


def test_an_sdxl_file_gives_no_vae(tmp_path):
    file = weights(tmp_path / "xl.safetensors", "first_stage_model.encoder.conv_in.weight", "conditioner.embedders.0.a")
    with pytest.raises(UserError, match="SDXL"):
        describe_vae(str(file))


def test_a_tokenizer_folder_without_tokenizer_is_remarked(tiny_folder, tmp_path):
    def notices(folder):
        options = ModelOptions(pretrained_model_name_or_path=str(tiny_folder("sd1")))
        return check_model_source(options, PromptOptions(tokenizer_cache_dir=folder)).notices

    (notice,) = notices(tmp_path / "cache")
    assert "cache has no tokenizer" in notice
    assert notices(tiny_folder("sd1") / "tokenizer") == ()


def test_weights_in_full_precision_and_without_pickle_come_first(tmp_path):
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
        assert weight_file(tmp_path, "text_encoder").name == name


def test_nothing_heavy_is_imported(tiny_folder):
    code = (
        "import sys; from library.models.detect import check_model_source; "
        "from library.models.options import ModelOptions, PromptOptions; "
        "model = ModelOptions(pretrained_model_name_or_path=sys.argv[1]); check_model_source(model, PromptOptions()); "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tiny_folder("sd1"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
