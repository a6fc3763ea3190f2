"""Key maps against recorded key lists of the full-size models, and against diffusers' own converters."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from library.models import ldm_keys
from library.models.structure import shipped_config
from tests.tiny import tiny_parts

GOLDEN = Path(__file__).parents[2] / "golden"


@cache
def full_size(part):
    """The state dict of a full-size part, without its memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        if part.startswith("unet"):
            return UNet2DConditionModel.from_config(shipped_config(part)).state_dict()
        if part == "vae":
            return AutoencoderKL.from_config(shipped_config(part)).state_dict()
        return CLIPTextModel(CLIPTextConfig(**shipped_config(part))).state_dict()


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["keys"]


def checkpoint(family, *, stand_ins=True):
    sd2 = family == "sd2"
    text = full_size(f"text_encoder_{family}")
    parts = {
        ldm_keys.UNET_PREFIX: ldm_keys.unet_to_ldm(full_size(f"unet_{family}"), linear_projection=sd2),
        ldm_keys.VAE_PREFIX: ldm_keys.vae_to_ldm(full_size("vae")),
        ldm_keys.SD2_TEXT_PREFIX if sd2 else ldm_keys.SD1_TEXT_PREFIX: (
            ldm_keys.text_to_sd2(text, stand_ins=stand_ins) if sd2 else ldm_keys.text_to_sd1(text)
        ),
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def below(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_shipped_configurations_build_the_recorded_modules():
    assert shapes(full_size("unet_sd1")) == golden("diffusers_unet_keys_sd1")
    with_prefix = ldm_keys.text_to_sd1(full_size("text_encoder_sd1"))
    assert shapes(with_prefix) == golden("diffusers_te_keys_sd1")


def test_a_full_size_sd1_checkpoint_has_the_recorded_keys_and_shapes():
    assert shapes(checkpoint("sd1")) == golden("ldm_keys_sd1")


def test_a_full_size_sd2_checkpoint_has_the_recorded_keys_and_shapes():
    assert shapes(checkpoint("sd2")) == golden("ldm_keys_sd2_new")


def test_what_is_written_into_an_existing_sd2_checkpoint_is_recorded_too():
    assert shapes(checkpoint("sd2", stand_ins=False)) == golden("ldm_keys_sd2_update")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_full_size_checkpoint_loads_under_the_modules_names(family):
    tensors = checkpoint(family)
    text = full_size(f"text_encoder_{family}")

    assert shapes(ldm_keys.unet_from_ldm(below(tensors, ldm_keys.UNET_PREFIX))) == shapes(full_size(f"unet_{family}"))
    assert shapes(ldm_keys.vae_from_ldm(below(tensors, ldm_keys.VAE_PREFIX))) == shapes(full_size("vae"))
    if family == "sd1":
        loaded = ldm_keys.text_from_sd1(below(tensors, ldm_keys.SD1_TEXT_PREFIX))
    else:
        open_clip = below(tensors, ldm_keys.SD2_TEXT_PREFIX)
        loaded = ldm_keys.text_from_sd2(open_clip, layers=ldm_keys.sd2_text_layers(open_clip))
    assert shapes(loaded) == shapes(text)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_weight_survives_the_way_there_and_back(kind, layers):
    parts = tiny_parts(kind, layers_per_block=layers)
    unet, vae, text = (part.state_dict() for part in (parts.unet, parts.vae, parts.text_encoder))

    unet_back = ldm_keys.unet_from_ldm(ldm_keys.unet_to_ldm(unet, linear_projection=kind == "sd2"))
    vae_back = ldm_keys.vae_from_ldm(ldm_keys.vae_to_ldm(vae))
    if kind == "sd1":
        text_back = ldm_keys.text_from_sd1(ldm_keys.text_to_sd1(text))
    else:
        text_back = ldm_keys.text_from_sd2(ldm_keys.text_to_sd2(text), layers=3)

    for before, after in ((unet, unet_back), (vae, vae_back), (text, text_back)):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_own_converters_agree_value_by_value(kind):
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    parts = tiny_parts(kind)
    unet = ldm_keys.unet_to_ldm(parts.unet.state_dict(), linear_projection=kind == "sd2")
    vae = ldm_keys.vae_to_ldm(parts.vae.state_dict())
    theirs = convert_ldm_unet_checkpoint(
        {ldm_keys.UNET_PREFIX + name: tensor for name, tensor in unet.items()}, dict(parts.unet.config)
    )
    theirs_vae = convert_ldm_vae_checkpoint(
        {ldm_keys.VAE_PREFIX + name: tensor for name, tensor in vae.items()}, dict(parts.vae.config)
    )
    pairs = [(parts.unet, theirs), (parts.vae, theirs_vae)]
    if kind == "sd1":
        text = ldm_keys.text_to_sd1(parts.text_encoder.state_dict())
        converted = convert_ldm_clip_checkpoint({ldm_keys.SD1_TEXT_PREFIX + n: t for n, t in text.items()})
        pairs.append((parts.text_encoder, {n.removeprefix("text_model."): t for n, t in converted.items()}))

    for module, converted in pairs:
        ours = module.state_dict()
        assert ours.keys() == converted.keys()
        assert all(torch.equal(ours[name], converted[name].reshape(ours[name].shape)) for name in ours)


def test_diffusers_open_clip_converter_agrees_value_by_value():
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    parts = tiny_parts("sd2")
    open_clip = ldm_keys.text_to_sd2(parts.text_encoder.state_dict())
    # The converter splits by the width that it reads off the text projection.
    theirs = convert_open_clip_checkpoint(parts.text_encoder, dict(open_clip), prefix="")
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    ours = ldm_keys.text_from_sd2(open_clip, layers=3)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_old_text_encoders_load_with_and_without_their_prefix():
    text = tiny_parts("sd1").text_encoder.state_dict()
    with_prefix = ldm_keys.text_to_sd1(text) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    flat = dict(text) | {"embeddings.position_ids": torch.arange(77)[None]}

    assert ldm_keys.text_from_sd1(with_prefix).keys() == text.keys()
    assert ldm_keys.text_from_sd1(flat).keys() == text.keys()


def test_the_vae_of_an_old_folder_loads():
    vae = tiny_parts("sd1").vae.state_dict()
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in vae.items():
        for new, before in renames.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    assert old.keys() != vae.keys()

    again = ldm_keys.vae_from_folder(old)

    assert again.keys() == vae.keys()
    assert all(torch.equal(again[name], vae[name]) for name in vae)


def test_projections_are_written_in_the_familys_shape_whatever_the_module_has():
    unet = tiny_parts("sd1").unet.state_dict()
    written = ldm_keys.unet_to_ldm(unet, linear_projection=True)
    projections = [tensor for name, tensor in written.items() if name.endswith(("proj_in.weight", "proj_out.weight"))]
    assert len(projections) == 32
    assert all(tensor.ndim == 2 for tensor in projections)


def test_an_unknown_name_is_kept():
    assert "label_emb.0.weight" in ldm_keys.unet_from_ldm({"label_emb.0.weight": torch.zeros(1)})


@pytest.mark.parametrize(("count", "used"), [(24, 23), (23, 23), (4, 3), (0, 0)])
def test_sd2_uses_all_open_clip_layers_but_the_last(count, used):
    names = [f"transformer.resblocks.{layer}.ln_1.weight" for layer in range(count)]
    assert ldm_keys.sd2_text_layers(names) == used
