"""Merging networks into a model: its layers get the sum of the changes, and nothing else changes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import read_metadata, read_tensors, write_tensors
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from networks.oft import create_network as create_oft
from tests.networks.test_lora_network import trained
from tests.networks.tool_runs import deltas, lora, run
from tests.tiny import tiny_ldm, tiny_parts, tiny_sd

EXTRA = {"model_ema.decay": torch.tensor(0.9), "alphas_cumprod": torch.ones(7, dtype=torch.float64)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models of both kinds in every form, and two networks with convolutions for each."""
    folder = tmp_path_factory.mktemp("inputs")
    for kind in ("sd1", "sd2"):
        tiny_sd(folder / kind, kind, layers_per_block=1)
        for suffix in (".safetensors", ".ckpt"):
            path = tiny_ldm(folder, kind, suffix, layers_per_block=1)
            file = read_tensors(path)
            more = {"extra": {**file.extra, "global_step": 70}} if suffix == ".ckpt" else {"metadata": file.metadata}
            write_tensors(path, file.tensors, kept=EXTRA, **more)
        for name, dim in (("one", 4), ("two", 2)):
            network = trained(tiny_parts(kind, layers_per_block=1), dim=dim, alpha=1.0, seed=dim, conv_dim=2)
            record = {"ss_base_model_version": "sd_v1" if kind == "sd1" else "sd_v2_v"}
            network.save_weights(str(folder / f"{kind}-{name}.safetensors"), None, record)
    return folder


def merge(model: Path, target: Path, *words: object, kind: str = "sd1") -> int:
    networks = [model.parent / f"{kind}-{name}.safetensors" for name in ("one", "two")]
    flags = ["--v2"] if kind == "sd2" else []
    given = ("--models", *networks, "--ratios", 0.5, -1, *flags, *words)
    return run("merge_lora", "--sd_model", model, "--save_to", target, *given)


def weights(path: Path, kind: str = "sd1") -> dict[str, torch.Tensor]:
    """The weights of U-Net and text encoder by the names of adapters, and those of the VAE."""
    loaded = load_stable_diffusion(
        ModelOptions(pretrained_model_name_or_path=str(path), v2=kind == "sd2"), PromptOptions()
    )
    parts = {"lora_unet": loaded.unet, "lora_te_text_model": loaded.text_encoder, "vae": loaded.vae}
    return {
        f"{part}_{name.removesuffix('.weight').replace('.', '_')}": tensor.double()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def expected(model: Path, kind: str) -> dict[str, torch.Tensor]:
    """The model's weights with the changes added by the plain formula."""
    found = weights(model, kind)
    for name, ratio in (("one", 0.5), ("two", -1.0)):
        for layer, delta in deltas(model.parent / f"{kind}-{name}.safetensors").items():
            found[layer] = found[layer] + ratio * delta.reshape(found[layer].shape)
    return found


@pytest.mark.parametrize(("kind", "suffix"), [("sd1", ".safetensors"), ("sd2", ".ckpt"), ("sd1", ""), ("sd2", "")])
def test_the_layers_get_the_sum_and_nothing_else_changes(kind, suffix, inputs, tmp_path):
    model, target = inputs / f"{kind}{suffix}", tmp_path / f"out{suffix}"
    assert merge(model, target, kind=kind) == 0
    found, wanted = weights(target, kind), expected(model, kind)
    assert found.keys() == wanted.keys()
    changed = deltas(inputs / f"{kind}-one.safetensors").keys()
    for name, tensor in found.items():
        if name in changed:
            torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-6, msg=name)
        else:
            assert torch.equal(tensor, wanted[name]), name
    if suffix:
        before, after = read_tensors(model), read_tensors(target)
        assert {name: (t.shape, t.dtype) for name, t in before.tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in after.tensors.items()
        }
        same = [name for name, tensor in before.tensors.items() if torch.equal(tensor, after.tensors[name])]
        assert EXTRA.keys() <= set(same)
        assert before.extra.get("global_step") == after.extra.get("global_step")
    else:
        assert load_file(target / "vae/diffusion_pytorch_model.safetensors").keys()
        assert not list(target.rglob("*.bin"))


def test_every_weight_keeps_its_number_format(inputs, tmp_path):
    file = read_tensors(inputs / "sd1.safetensors")
    mixed = {
        name: tensor.half() if name.startswith("model.diffusion_model.") else tensor.bfloat16()
        for name, tensor in file.tensors.items()
        if name not in EXTRA
    }
    for name in ("sd1-one.safetensors", "sd1-two.safetensors"):
        shutil.copy(inputs / name, tmp_path)
    write_tensors(tmp_path / "mixed.safetensors", mixed, kept=EXTRA, metadata=file.metadata)
    merge(tmp_path / "mixed.safetensors", tmp_path / "out.safetensors")
    after = read_tensors(tmp_path / "out.safetensors").tensors
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in {**mixed, **EXTRA}.items()
    }
    vae = [name for name in mixed if name.startswith("first_stage_model.")]
    assert vae
    assert all(torch.equal(mixed[name], after[name]) for name in vae)
    merge(tmp_path / "mixed.safetensors", tmp_path / "out.safetensors", "--save_precision", "float")
    after = read_tensors(tmp_path / "out.safetensors").tensors
    assert {tensor.dtype for name, tensor in after.items() if name not in EXTRA} == {torch.float32}


def test_the_metadata_says_what_was_merged(inputs, tmp_path):
    merge(inputs / "sd2.safetensors", tmp_path / "out.safetensors", kind="sd2")
    found = read_metadata(tmp_path / "out.safetensors")
    assert found["modelspec.merged_from"] == "sd2, sd2-one, sd2-two"
    assert found["modelspec.title"] == "out"
    # A bare checkpoint cannot tell; the networks can.
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    merge(inputs / "sd2.safetensors", tmp_path / "OUT.SAFETENSORS", "--no_metadata", kind="sd2")
    assert not [name for name in read_metadata(tmp_path / "OUT.SAFETENSORS") if name.startswith("modelspec")]


def test_weights_are_rounded_to_the_precision_first(inputs, tmp_path):
    name = "sd1-one.safetensors"
    save_file({key: t.bfloat16().float() for key, t in load_file(inputs / name).items()}, tmp_path / name)
    words = ("--sd_model", inputs / "sd1.safetensors", "--save_to", tmp_path / "out.safetensors")
    run("merge_lora", *words, "--models", tmp_path / name)
    plain = load_file(tmp_path / "out.safetensors")
    run("merge_lora", *words, "--models", inputs / name, "--precision", "bf16")
    rounded = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, rounded[key]) for key, tensor in plain.items())


def test_oft_is_merged_as_well(inputs, tmp_path):
    parts = tiny_parts("sd1", layers_per_block=1)
    network = create_oft(1.0, 2, 1.0, None, None, parts.unet)
    for module in network.modules_by_name().values():
        torch.nn.init.normal_(module.oft_blocks, std=0.1)
    network.save_weights(str(tmp_path / "oft.safetensors"), None, {})
    words = ("--models", tmp_path / "oft.safetensors", "--save_to", tmp_path / "out.safetensors")
    run("merge_lora", "--sd_model", inputs / "sd1.safetensors", *words)
    before, after = weights(inputs / "sd1.safetensors"), weights(tmp_path / "out.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.replace("oft_unet", "lora_unet") for name in network.modules_by_name()}
    # A rotation keeps lengths.
    for name in changed:
        torch.testing.assert_close(before[name].flatten(1).norm(dim=0), after[name].flatten(1).norm(dim=0))


def test_what_has_no_effect_is_told(inputs, tmp_path, capfd):
    merge(inputs / "sd1.safetensors", tmp_path / "out.safetensors", "--concat")
    assert "without effect with --sd_model: --concat and --shuffle" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sd_model IN/sd1.safetensors --save_to out.safetensors --models IN/sd2-one.safetensors", "made for sd_v2_v"),
        ("--sd_model IN/sd2.safetensors --save_to out.safetensors --models IN/sd2-one.safetensors", "Add --v2"),
        ("--sd_model IN/sd1 --v2 --save_to out --models IN/sd2-one.safetensors", "Leave out --v2"),
        ("--sd_model IN/sd3.safetensors --save_to out.ckpt --models IN/sd1-one.safetensors", "no such file"),
        ("--sd_model IN/sd1-one.safetensors --save_to out.ckpt --models IN/sd1-one.safetensors", "a LoRA"),
        ("--sd_model IN/sd1.safetensors --save_to out --models IN/sd1-one.safetensors", "which kind of file"),
        ("--sd_model IN/sd1.safetensors --save_to out.pt --models IN/sd1-one.safetensors", "a model ends in"),
        (
            "--sd_model IN/sd1.safetensors --save_to IN/sd1.safetensors --models IN/sd1-one.safetensors",
            "replace itself",
        ),
        ("--sd_model IN/sd1 --save_to IN --models IN/sd1-one.safetensors", "did not write"),
        ("--sd_model IN/sd1 --models IN/sd1-one.safetensors", "--save_to is missing"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(words, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("networks.model_merging.loaded_model", None)
    with pytest.raises(UserError, match=message) as caught:
        run("merge_lora", *words.replace("IN", str(inputs)).split())
    assert "--pretrained_model_name_or_path" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_network_of_another_width_is_named(inputs, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(lora(2, 1.0, 0, {layer: (11, 7, 0)}), tmp_path / "wide.safetensors")
    words = ("--models", tmp_path / "wide.safetensors", "--save_to", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="has the shape") as caught:
        run("merge_lora", "--sd_model", inputs / "sd1.safetensors", *words)
    assert "wide.safetensors" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
