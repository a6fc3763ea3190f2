"""A saved model is the model: in every format, for every kind, here and in diffusers."""

import json
import logging
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import read_tensors
from library.models.ldm_file import ldm_state
from library.models.structure import shipped_config
from tests.library.models.saving import (
    FOLDERS,
    FORMATS,
    KINDS,
    METADATA,
    PARTS,
    assert_equal,
    load,
    save,
    trained,
    weights,
)
from tests.tiny import tiny_ldm, tiny_sd


@pytest.fixture(scope="module")
def base(tiny_folder, tiny_file):
    """``base("sd1", "folder")``: a loaded model, the same one for every test; not to be changed."""
    return cache(lambda kind, form: load(tiny_folder(kind) if form == "folder" else tiny_file(kind, form), kind))


CASES = [(kind, format) for kind in KINDS for format in FORMATS if kind != "sd2" or "safetensors" in format]


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_what_is_saved_loads_bit_equal_here_and_in_diffusers(base, tiny_folder, tmp_path, kind, format):
    """Into the other form than the one it came from; the tests below stay within one."""
    from diffusers import StableDiffusionPipeline

    model = base(kind, "safetensors" if format in FOLDERS else "folder")
    path = save(tmp_path, model, format)

    again = load(path, kind)
    assert_equal(weights(again), weights(model))
    assert again.tokenizer.pad_token_id == model.tokenizer.pad_token_id
    if format in FOLDERS:
        pipeline = StableDiffusionPipeline.from_pretrained(str(path), local_files_only=True)
    else:
        config = str(tiny_folder(kind))
        pipeline = StableDiffusionPipeline.from_single_file(str(path), config=config, local_files_only=True)
    assert_equal(weights(pipeline), weights(model))
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if kind == "sd2_v" else "epsilon")
    ids = [tokenizer("a photo of a cat")["input_ids"] for tokenizer in (pipeline.tokenizer, model.tokenizer)]
    assert ids[0] == ids[1]
    assert pipeline.tokenizer.pad_token == model.tokenizer.pad_token
    assert pipeline.tokenizer.model_max_length == 77


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("ckpt", torch.float16),
        ("safetensors", torch.bfloat16),
        ("diffusers", torch.bfloat16),
        ("diffusers_safetensors", torch.float16),
    ],
)
def test_every_format_has_the_dtype_asked_for(base, tmp_path, format, dtype):
    model = base("sd2", "folder")
    path = save(tmp_path, model, format, dtype=dtype)

    files = [path] if path.is_file() else [*path.rglob("*.bin"), *path.rglob("*.safetensors")]
    assert len(files) == (3 if format in FOLDERS else 1)
    found = [tensor.dtype for file in files for tensor in read_tensors(file).tensors.values()]
    # The logit scale of a single file is a whole number.
    assert set(found) == ({dtype} if format in FOLDERS else {dtype, torch.int64})
    assert_equal(
        weights(load(path, "sd2")), {name: tensor.to(dtype).float() for name, tensor in weights(model).items()}
    )
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "form", "format"),
    [("sd1", "folder", "diffusers"), ("sd1", "ckpt", "safetensors"), ("sd2", "safetensors", "safetensors")],
)
def test_without_a_dtype_trained_parts_keep_their_own_and_others_that_of_the_source(
    tiny_folder, tiny_file, tmp_path, kind, form, format
):
    given = {"dtype": torch.float16, "unet_dtype": torch.float32, "text_encoder_dtype": torch.bfloat16}
    expected = {"unet": torch.float32, "vae": torch.float32, "text_encoder": torch.bfloat16}
    source = tiny_folder(kind) if form == "folder" else tiny_file(kind, form)
    model = trained(load(source, kind, **given))
    assert model.vae.dtype == torch.float16

    path = save(tmp_path, model, format)

    assert model.vae.dtype == torch.float16
    assert_equal(weights(load(path, kind, **given)), weights(model))
    assert_equal(load(path, kind).vae.state_dict(), load(source, kind).vae.state_dict())
    if format in FOLDERS:
        files = {part: next((path / part).glob("*.bin")) for part in PARTS}
        found = {part: {t.dtype for t in read_tensors(file).tensors.values()} for part, file in files.items()}
    else:
        prefixes = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
        tensors = {name: tensor for name, tensor in load_file(path).items() if tensor.is_floating_point()}
        found = {part: {t.dtype for n, t in tensors.items() if n.startswith(p)} for part, p in prefixes.items()}
    if kind == "sd2" and form != "folder" and format not in FOLDERS:
        # What Stable Diffusion does not use of the source's text encoder is as it was.
        expected["text_encoder"] = {torch.bfloat16, torch.float32}
    assert found == {part: dtype if isinstance(dtype, set) else {dtype} for part, dtype in expected.items()}


def test_a_frozen_text_encoder_loses_nothing_in_a_run_of_16_bits(tiny_folder, tmp_path):
    model = load(tiny_folder("sd1"), dtype=torch.bfloat16, unet_dtype=torch.float32)
    path = save(tmp_path, model, "safetensors", dtype=torch.float16)
    assert_equal(
        load(path, "sd1", dtype=torch.float16).text_encoder.state_dict(),
        load(tiny_folder("sd1"), "sd1", dtype=torch.float16).text_encoder.state_dict(),
    )


def test_a_replaced_vae_and_a_vanished_source_are_saved_as_they_are(tiny_folder, tmp_path):
    source = tmp_path / "base.safetensors"
    source.write_bytes(save(tmp_path, load(tiny_folder("sd1")), "safetensors").read_bytes())
    other = tiny_sd(tmp_path / "other", "sd1", seed=1) / "vae"
    model = load(source, vae=other, dtype=torch.bfloat16)
    expected = {name: tensor.float() for name, tensor in model.vae.state_dict().items()}
    assert_equal(load(save(tmp_path, model, "safetensors")).vae.state_dict(), expected)
    source.unlink()
    assert_equal(load(save(tmp_path, model, "diffusers")).vae.state_dict(), expected)


EXTRAS = {
    "alphas_cumprod": torch.linspace(0, 1, 1000, dtype=torch.float64),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.full((32, 4, 3, 3), 0.5, dtype=torch.float16),
    "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    "first_stage_model.loss.logvar": torch.zeros(()),
}


def source_with_extras(folder, kind, suffix):
    """A checkpoint as they are found: with more than a model needs, and half of it in other dtypes."""
    made = read_tensors(tiny_ldm(folder, kind))
    tensors = {name: tensor.clone() for name, tensor in made.tensors.items()}
    extras = dict(EXTRAS)
    if kind == "sd1":
        extras["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        open_clip = "cond_stage_model.model."
        unused = [n for n in tensors if "resblocks.3." in n or n in (f"{open_clip}text_projection",)]
        assert len(unused) == 13
        extras |= {name: torch.full_like(tensors[name], 0.25).half() for name in unused}
        extras[f"{open_clip}logit_scale"] = torch.tensor(4.6052)
    path = folder / f"source{suffix}"
    if suffix == ".safetensors":
        save_file(tensors | extras, path, metadata=made.metadata)
    else:
        counts = {"epoch": 10, "global_step": 1000, "pytorch-lightning_version": "1.4.2"}
        torch.save({"state_dict": tensors | extras, **counts, **made.metadata}, path)
    return path, extras


@pytest.mark.parametrize(("suffix", "format"), [(".ckpt", "safetensors"), (".safetensors", "ckpt")])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_rest_of_a_checkpoint_is_carried_over(tmp_path, kind, suffix, format):
    source, extras = source_with_extras(tmp_path, kind, suffix)
    before = read_tensors(source).tensors
    model = trained(load(source, kind))

    path = save(tmp_path / "out", model, format, dtype=torch.bfloat16)

    after = read_tensors(path).tensors
    assert after.keys() == before.keys()
    for name, tensor in extras.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert {after[name].dtype for name in after.keys() - extras.keys()} == {torch.bfloat16}
    assert_equal(weights(load(path, kind)), {name: t.bfloat16().float() for name, t in weights(model).items()})


def test_steps_and_epochs_are_counted_on(tmp_path):
    source, _ = source_with_extras(tmp_path, "sd1", ".ckpt")
    first = save(tmp_path / "1", load(source), "ckpt", step=3, epoch=2)
    second = save(tmp_path / "2", load(first), "ckpt", step=5, epoch=1)
    fresh = save(tmp_path / "3", load(tiny_ldm(tmp_path / "plain")), "ckpt", step=5, epoch=1)
    found = [torch.load(path, weights_only=True) for path in (first, second, fresh)]
    assert [(content["epoch"], content["global_step"]) for content in found] == [(12, 1003), (13, 1008), (1, 5)]
    assert all(content.keys() - {"diffusers_config"} == {"state_dict", "epoch", "global_step"} for content in found)


def test_a_checkpoint_of_old_names_is_not_doubled(tmp_path):
    made = read_tensors(tiny_ldm(tmp_path, "sd1"))
    names = {name: name.replace("transformer.text_model.", "transformer.") for name in made.tensors}
    old = {names[name]: tensor.clone() for name, tensor in made.tensors.items()}
    save_file(old, tmp_path / "old.safetensors", metadata=made.metadata)
    model = trained(load(tmp_path / "old.safetensors"))
    path = save(tmp_path, model, "safetensors")
    assert load_file(path).keys() == made.tensors.keys()
    assert_equal(weights(load(path)), weights(model))


@pytest.mark.parametrize(("kind", "change"), [("sd1", "removed"), ("sd2", "rewritten"), ("sd2", "cut")])
def test_a_source_that_is_gone_costs_no_result(tmp_path, caplog, kind, change):
    source, _ = source_with_extras(tmp_path, kind, ".ckpt")
    model = trained(load(source, kind))
    if change == "removed":
        source.unlink()
    else:
        content = source.read_bytes()
        source.unlink()
        source.write_bytes(content if change == "rewritten" else content[:1000])
        os.utime(source, ns=(1, 1))

    with caplog.at_level(logging.WARNING):
        path = save(tmp_path, model, "safetensors")

    assert "not carried over" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert_equal(weights(load(path, kind)), weights(model))
    assert load_file(path).keys() == read_tensors(tiny_ldm(tmp_path / "plain", kind)).tensors.keys()


def test_a_single_file_has_the_metadata(base, tmp_path):
    path = save(tmp_path, base("sd1", "folder"), "safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {*METADATA, "format", "diffusers_config"}
    assert METADATA.items() <= metadata.items()


@pytest.mark.parametrize(
    ("form", "format"), [("folder", "ckpt"), ("file", "safetensors"), ("file", "diffusers_safetensors")]
)
def test_a_replacement_vae_is_inside(base, tiny_folder, tiny_file, tmp_path, form, format):
    other = tiny_sd(tmp_path / "other", seed=7)
    model = load(tiny_folder("sd1") if form == "folder" else tiny_file("sd1"), vae=other)
    path = save(tmp_path, model, format)
    expected = load(other).vae.state_dict()
    assert_equal(load(path).vae.state_dict(), expected)
    assert not torch.equal(base("sd1", "folder").vae.encoder.conv_in.weight, expected["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("part", "format"), [("unet", "ckpt"), ("vae", "safetensors"), ("vae", "diffusers"), ("text_encoder", "diffusers")]
)
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tiny_folder, tmp_path, part, format):
    model = load(tiny_folder("sd1"))
    former = save(tmp_path, model, format)
    stamps = {file: file.stat().st_mtime_ns for file in (former, *former.rglob("*"))}
    list(getattr(model, part).parameters())[-1].fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        save(tmp_path, model, format)
    assert {file: file.stat().st_mtime_ns for file in (former, *former.rglob("*"))} == stamps
    assert [entry.name for entry in tmp_path.iterdir()] == [former.name]


def test_weights_too_large_for_the_dtype_are_refused(tiny_folder, tmp_path):
    model = load(tiny_folder("sd1"))
    model.unet.conv_in.weight[0] = 1e6
    with pytest.raises(UserError, match="not finite"):
        save(tmp_path, model, "diffusers_safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_the_same_model_makes_the_same_bytes(base, tmp_path):
    model = base("sd2", "safetensors")
    for format in FORMATS:
        one, other = (save(tmp_path / name, model, format) for name in "ab")
        files = [one] if one.is_file() else [file for file in one.rglob("*") if file.is_file()]
        assert all(file.read_bytes() == (other / file.relative_to(one)).read_bytes() for file in files)


def test_the_place_of_the_source_is_not_shown(base, tiny_file):
    shown = repr(base("sd1", "safetensors").origin)
    assert "kind='file'" in shown
    assert str(tiny_file("sd1").parent) not in shown


@pytest.mark.parametrize(("family", "stand_ins", "name"), [
    ("sd1", True, "ldm_keys_sd1"), ("sd1", False, "ldm_keys_sd1"),
    ("sd2", True, "ldm_keys_sd2_new"), ("sd2", False, "ldm_keys_sd2_update"),
])  # fmt: skip
def test_a_full_size_model_is_written_under_the_recorded_names(family, stand_ins, name):
    """On the meta device: names and shapes of what goes into a file, with and without an earlier one."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(shipped_config(f"unet_{family}"))
        vae = AutoencoderKL.from_config(shipped_config("vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig(**shipped_config(f"text_encoder_{family}")))
    state = ldm_state(text_encoder=text_encoder, vae=vae, unet=unet, v2=family == "sd2", stand_ins=stand_ins)
    golden = json.loads((Path(__file__).parents[2] / f"golden/{name}.json").read_text())["keys"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == golden
