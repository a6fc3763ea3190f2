"""Loading the same model from every form it comes in."""

import json
import logging
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models import ldm_keys
from library.models.latents import decode_latents, encode_images
from library.models.ldm_file import ldm_state, ldm_structure, write_ldm
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from library.models.structure import CONFIG_KEY
from library.models.tokenizer import load_tokenizer
from tests.tiny import tiny_ldm, tiny_parts, tiny_sd

KINDS = ["sd1", "sd2", "sd2_v"]


def load(source, kind="sd1", *, vae=None, dtype=torch.float32, prompts=None):
    options = ModelOptions(
        pretrained_model_name_or_path=str(source),
        v2=kind != "sd1",
        v_parameterization=kind == "sd2_v",
        vae=vae and str(vae),
    )
    return load_stable_diffusion(options, prompts or PromptOptions(), dtype=dtype)


@torch.no_grad()
def outputs(model):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    pixels = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    ids = torch.randint(0, 49408, (2, 77), generator=generator)
    context = model.text_encoder(ids).last_hidden_state
    prediction = model.unet(latents, torch.tensor([10, 900]), context).sample
    return [context, prediction, *encode_images(model.vae, pixels), decode_latents(model.vae, latents, 1.0)]


def assert_same(ours, theirs):
    for one, other in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_computes_what_the_modules_compute(tiny_folder, tiny_file, kind):
    expected = tiny_parts(kind)
    for source in (tiny_folder(kind), tiny_file(kind, ".safetensors"), tiny_file(kind, ".ckpt")):
        model = load(source, kind)
        assert_same(model, expected)
        assert model.source == source.name
        assert model.variant.base_model_version == {"sd1": "sd_v1", "sd2": "sd_v2", "sd2_v": "sd_v2_v"}[kind]
        assert model.variant.text_width == model.unet.config.cross_attention_dim
        assert model.tokenizer.pad_token_id == (49407 if kind == "sd1" else 0)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_reads_the_tiny_folder_alike(tiny_folder, kind):
    from diffusers import StableDiffusionPipeline

    assert_same(load(tiny_folder(kind), kind), StableDiffusionPipeline.from_pretrained(tiny_folder(kind)))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_modules_are_ready_for_use(tiny_file, suffix):
    model = load(tiny_file("sd1", suffix), dtype=torch.bfloat16)
    for module in (model.unet, model.vae, model.text_encoder):
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())


def test_a_short_model_loads_from_a_file(tmp_path):
    expected = tiny_parts("sd1", layers_per_block=1, channels=(32, 64, 64))
    assert_same(load(tiny_ldm(tmp_path, layers_per_block=1, channels=(32, 64, 64))), expected)


def test_a_bare_file_of_the_usual_structure_needs_no_configuration(tmp_path):
    """8 heads and 32 groups, as in any download: the structure comes from the shapes."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = tiny_parts("sd1", norm_groups=32)
    vae = AutoencoderKL.from_config(
        parts.configs["vae"] | {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32, "layers_per_block": 2}
    )
    text = CLIPTextModel(CLIPTextConfig(**parts.configs["text_encoder"] | {"num_attention_heads": 1}))
    state = ldm_state(text_encoder=text, vae=vae, unet=parts.unet, v2=False)
    state |= {"alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    assert ldm_structure(text_encoder=text, vae=vae, unet=parts.unet, v2=False) == {}

    model = load(tmp_path / "model.safetensors")

    parts = type(parts)(text.eval(), vae.eval(), parts.unet, parts.configs)
    assert_same(model, parts)


def test_an_inpainting_width_loads(tmp_path):
    from diffusers import UNet2DConditionModel

    parts = tiny_parts("sd1")
    unet = UNet2DConditionModel.from_config(parts.configs["unet"] | {"in_channels": 9})
    write_ldm(tmp_path / "m.safetensors", text_encoder=parts.text_encoder, vae=parts.vae, unet=unet, v2=False)
    assert load(tmp_path / "m.safetensors").unet.conv_in.in_channels == 9


def test_a_file_without_the_text_model_prefix_loads(tiny_file, tmp_path):
    from safetensors import safe_open

    with safe_open(tiny_file("sd1"), "pt") as file:
        metadata = file.metadata()
    old = {
        name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(tiny_file("sd1")).items()
    }
    save_file(old, tmp_path / "old.safetensors", metadata=metadata)
    assert_same(load(tmp_path / "old.safetensors"), tiny_parts("sd1"))


def test_an_sd2_folder_with_convolutions_becomes_linear(tmp_path):
    folder = tiny_sd(tmp_path / "sd2", "sd2")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"use_linear_projection": False}))
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = {
        name: tensor[..., None, None].clone()
        if name.endswith(("proj_in.weight", "proj_out.weight"))
        else tensor.clone()
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file)

    model = load(folder, "sd2")

    assert model.unet.config.use_linear_projection
    assert_same(model, tiny_parts("sd2"))


def test_a_folder_of_old_torch_files_loads(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    for part, old in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = folder / part / f"{old}.safetensors"
        name = "pytorch_model.bin" if part == "text_encoder" else f"{old}.bin"
        torch.save(load_file(file), folder / part / name)
        file.unlink()
    assert_same(load(folder), tiny_parts("sd1"))


def test_writing_casts_fractions_and_adds_what_sd2_files_have(tmp_path):
    parts = tiny_parts("sd2")
    path = tmp_path / "half.safetensors"
    write_ldm(
        path,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        unet=parts.unet,
        v2=True,
        dtype=torch.float16,
        metadata={"modelspec.title": "x"},
    )
    tensors = load_file(path)
    assert tensors.pop("cond_stage_model.model.logit_scale").dtype == torch.int64
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    layers = {name.split("resblocks.")[1].split(".")[0] for name in tensors if "resblocks." in name}
    assert layers == {"0", "1", "2", "3"}
    copied = "cond_stage_model.model.transformer.resblocks.{}.mlp.c_fc.weight"
    assert torch.equal(tensors[copied.format(3)], tensors[copied.format(2)])
    torch.testing.assert_close(
        outputs(load(path, "sd2"))[1], outputs(parts)[1], atol=2e-2, rtol=2e-2
    )  # half precision on the way


def other_vae(**kwargs):
    return tiny_parts("sd1", seed=7, **kwargs).vae


@pytest.fixture(scope="module")
def vae_forms(tmp_path_factory):
    """One VAE, different from the tiny models' own, in every form that ``--vae`` takes."""
    root = tmp_path_factory.mktemp("vae")
    vae = other_vae()
    parts = tiny_parts("sd1", seed=7)
    structure = ldm_structure(text_encoder=parts.text_encoder, vae=vae, unet=parts.unet, v2=False)
    bare = ldm_keys.vae_to_ldm(vae.state_dict())
    save_file(bare, root / "bare.safetensors", metadata=structure)
    torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(())}, **structure}, root / "bare.ckpt")
    torch.save(bare | structure, root / "bare.pt")
    whole = tiny_sd(root / "whole", seed=7)
    torch.save(vae.state_dict(), whole / "vae/diffusion_pytorch_model.bin")
    return {
        "whole checkpoint": tiny_ldm(root, seed=7),
        "whole torch checkpoint": tiny_ldm(root, "sd2", ".ckpt", seed=7),
        "bare safetensors": root / "bare.safetensors",
        "bare ckpt": root / "bare.ckpt",
        "bare pt": root / "bare.pt",
        "diffusers bin": whole / "vae/diffusion_pytorch_model.bin",
        "diffusers safetensors": whole / "vae/diffusion_pytorch_model.safetensors",
        "vae folder": whole / "vae",
        "model folder": whole,
    }


@pytest.mark.parametrize(
    "form",
    [
        "whole checkpoint",
        "bare safetensors",
        "bare ckpt",
        "bare pt",
        "diffusers bin",
        "diffusers safetensors",
        "vae folder",
        "model folder",
    ],
)
def test_the_vae_is_replaced_in_every_form(tiny_folder, vae_forms, form):
    model = load(tiny_folder("sd1"), vae=vae_forms[form])

    own, other = tiny_parts("sd1"), other_vae()
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    torch.testing.assert_close(encode_images(model.vae, pixels), encode_images(other, pixels), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(encode_images(own.vae, pixels)[0], encode_images(other, pixels)[0], atol=1e-2)
    assert outputs(own)[1].allclose(outputs(model)[1], atol=1e-5)


def test_the_vae_of_another_family_is_no_matter(tiny_folder, vae_forms):
    model = load(tiny_folder("sd1"), vae=vae_forms["whole torch checkpoint"])
    expected = tiny_parts("sd2", seed=7).vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vae.state_dict().items())


@pytest.mark.parametrize(("kind", "other"), [("sd1", "sd2"), ("sd2", "sd1")])
@pytest.mark.parametrize("form", ["folder", ".ckpt"])
def test_the_wrong_family_is_refused(tiny_folder, tiny_file, kind, other, form):
    source = tiny_folder(kind) if form == "folder" else tiny_file(kind, form)
    with pytest.raises(UserError, match="--v2"):
        load(source, other)


def test_the_oldest_torch_format_is_read_and_checked_on_loading(tiny_file, tmp_path):
    content = torch.load(tiny_file("sd2", ".ckpt"), weights_only=True)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "old.ckpt", "sd2"), tiny_parts("sd2"))
    with pytest.raises(UserError, match="Add --v2|--v2 is not given"):
        load(tmp_path / "old.ckpt", "sd1")


def test_a_pickle_with_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({"state_dict": Harmful()}, protocol=2))
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Harmful()}, tmp_path / "zip.ckpt")
    for name in ("model.ckpt", "zip.ckpt"):
        with pytest.raises(UserError):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def edited(tiny_folder, tmp_path, part, change):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return folder


def test_missing_and_unknown_weights_are_named(tiny_folder, tmp_path):
    def change(tensors):
        tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")

    with pytest.raises(UserError, match=r"1 are missing \(conv_in.weight\) and 1 are not known \(conv_inn.weight\)"):
        load(edited(tiny_folder, tmp_path, "unet", change))


def test_wrong_shapes_are_named(tiny_folder, tmp_path):
    def change(tensors):
        tensors["quant_conv.weight"] = torch.zeros(8, 4, 1, 1)

    with pytest.raises(UserError, match=r"quant_conv.weight is \(8, 4, 1, 1\), not \(8, 8, 1, 1\)"):
        load(edited(tiny_folder, tmp_path, "vae", change))


def test_parts_that_do_not_belong_together_are_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    shutil.rmtree(folder / "unet")
    shutil.copytree(tiny_folder("sd2") / "unet", folder / "unet")
    with pytest.raises(UserError, match="U-Net reads text 96 wide, and the text encoder writes 64"):
        load(folder)


def test_a_vae_with_other_latents_is_refused(tiny_folder, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config(tiny_parts("sd1").configs["vae"] | {"latent_channels": 16}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="16 latent channels") as caught:
        load(tiny_folder("sd1"), vae=tmp_path)
    assert "--vae" in str(caught.value)


def test_a_configuration_that_cannot_be_built_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"down_block_types": ["Nonsense"] * 4}))
    with pytest.raises(UserError, match="configuration of the U-Net"):
        load(folder)


def test_added_tokens_of_a_folder_are_used(tmp_path):
    folder = tiny_sd(tmp_path / "model")
    tokenizer = load_tokenizer("sd1")
    tokenizer.add_tokens(["<shs>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    file = folder / "text_encoder/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    table = "text_model.embeddings.token_embedding.weight"
    tensors[table] = torch.cat([tensors[table], torch.ones(1, 64)])
    save_file(tensors, file)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"vocab_size": 49409}))

    model = load(folder)

    assert model.tokenizer("<shs>")["input_ids"] == [49406, 49408, 49407]


@pytest.mark.parametrize("below", ["", "openai_clip-vit-large-patch14"])
def test_the_tokenizer_folder_of_the_option_wins(tiny_folder, tmp_path, below):
    own = load_tokenizer("sd1")
    own.add_tokens(["<own>"])
    own.save_pretrained(tmp_path / below)
    prompts = PromptOptions(tokenizer_cache_dir=tmp_path)
    assert "<own>" in load(tiny_folder("sd1"), prompts=prompts).tokenizer.get_vocab()


def test_a_prediction_that_disagrees_is_warned_of(tiny_folder, caplog):
    with caplog.at_level(logging.WARNING, logger="library.models"):
        load_stable_diffusion(
            ModelOptions(pretrained_model_name_or_path=str(tiny_folder("sd2_v")), v2=True), PromptOptions()
        )
    assert "--v_parameterization" in caplog.text


def test_small_files_carry_their_configuration_without_paths(tiny_file):
    content = torch.load(tiny_file("sd1", ".ckpt"), weights_only=True)
    assert set(json.loads(content[CONFIG_KEY])) == {"unet", "vae", "text_encoder"}
    assert "_name_or_path" not in content[CONFIG_KEY]


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"layers_per_block": [1, 1, 1, 10**9]}),
        ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"down_block_types": ["DownBlock2D"] * 10**5}),
        ("vae", {"layers_per_block": 10**9}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
    ],
)
def test_a_configuration_of_more_layers_than_there_are_weights(part, changes, tmp_path):
    folder = tiny_sd(tmp_path / "sd1", "sd1", layers_per_block=1)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match="asks for .* layers, and there are"):
        load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(folder)), PromptOptions())
