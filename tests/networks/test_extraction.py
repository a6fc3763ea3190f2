"""A LoRA of what a tuned model has learnt, and LoRAs of the smaller ranks in a DyLoRA."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import read_metadata, read_tensors
from networks import dylora
from tests.networks.test_lora_network import trained
from tests.networks.tool_runs import (
    CASES,
    LAYERS,
    QUERY,
    TEXT,
    assert_close,
    best,
    deltas,
    run,
    sums,
)
from tests.tiny import tiny_ldm, tiny_parts, tiny_sd


@dataclass(frozen=True)
class Models:
    """A base model, and models that have a known change of rank 3, of 2 in 3x3 convolutions."""

    folder: Path
    changes: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd1", "sd2"):
        tiny_ldm(folder, kind, layers_per_block=1)
        # Large enough to count as a change of the text encoder.
        network = trained(tiny_parts(kind, layers_per_block=1), dim=3, alpha=30.0, conv_dim=2, conv_alpha=20.0)
        network.save_weights(str(folder / f"{kind}-lora.safetensors"), None, {})
        words = ("--models", folder / f"{kind}-lora.safetensors", *["--v2"] * (kind == "sd2"))
        base, tuned = folder / f"{kind}.safetensors", folder / f"{kind}-tuned.safetensors"
        run("merge_lora", "--sd_model", base, "--save_to", tuned, *words)
    tiny_sd(folder / "sd1", "sd1", layers_per_block=1)
    return Models(folder, deltas(folder / "sd1-lora.safetensors"))


def extract(at: Models, out: Path, *words: object, base: str = "sd1.safetensors", tuned: str = "sd1-tuned.safetensors"):
    given = ("--model_org", at.folder / base, "--model_tuned", at.folder / tuned, "--save_to", out)
    return run("extract_lora_from_models", *given, *words)


EXACT = ("--dim", 3, "--conv_dim", 2, "--clamp_quantile", 1)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_change_of_that_rank_is_found_again(kind, models, tmp_path, capfd):
    out, flags = tmp_path / "out.safetensors", ["--v2"] * (kind == "sd2")
    extract(models, out, *EXACT, *flags, base=f"{kind}.safetensors", tuned=f"{kind}-tuned.safetensors")
    assert_close(deltas(out), deltas(models.folder / f"{kind}-lora.safetensors"), places=1e-4)
    assert "100.00% of the change is kept" in capfd.readouterr().err
    # The base model with it is the tuned one.
    merged, tuned = tmp_path / "merged.safetensors", models.folder / f"{kind}-tuned.safetensors"
    run("merge_lora", "--sd_model", models.folder / f"{kind}.safetensors", "--models", out, "--save_to", merged, *flags)
    wanted = load_file(tuned)
    for name, tensor in load_file(merged).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=1e-4, msg=name)


def test_folders_and_files_may_be_mixed(models, tmp_path):
    extract(models, tmp_path / "out.safetensors", *EXACT, base="sd1")
    assert_close(deltas(tmp_path / "out.safetensors"), models.changes, places=1e-4)


def test_a_smaller_rank_is_the_nearest(models, tmp_path):
    extract(models, tmp_path / "out.safetensors", "--dim", 2, "--clamp_quantile", 1)
    found = deltas(tmp_path / "out.safetensors")
    for name in (TEXT, "lora_unet_mid_block_attentions_0_proj_in"):
        torch.testing.assert_close(found[name], best(models.changes[name], 2), atol=1e-4, rtol=1e-4)
    # Without --conv_dim the convolution blocks are left out.
    assert found.keys() == {name for name in models.changes if "resnets" not in name and "sampler" not in name}
    record = read_metadata(tmp_path / "out.safetensors")
    assert (record["ss_network_dim"], record["ss_network_alpha"], record["ss_v2"]) == ("2", "2", "False")
    assert record["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_numbers_are_limited_to_the_quantile(models, tmp_path):
    """Of both matrices' values with either sign, by numpy: signs of ranks are free in a decomposition."""
    whole, limited = tmp_path / "whole.safetensors", tmp_path / "limited.safetensors"
    extract(models, whole, "--dim", 2, "--clamp_quantile", 1)
    extract(models, limited, "--dim", 2, "--clamp_quantile", 0.9)
    before, after = load_file(whole), load_file(limited)
    for name in (TEXT, "lora_unet_mid_block_attentions_0_proj_in"):
        parts = [f"{name}.lora_{part}.weight" for part in ("up", "down")]
        values = np.concatenate([before[part].numpy().ravel() for part in parts])
        limit = np.quantile(np.concatenate([values, -values]), 0.9)
        for part in parts:
            torch.testing.assert_close(after[part], before[part].clamp(-limit, limit), atol=1e-3, rtol=1e-2)
        assert any(not torch.equal(after[part], before[part]) for part in parts)


def test_a_text_encoder_that_did_not_change_is_left_out(models, tmp_path, capfd):
    largest = max(float(change.abs().max()) for name, change in models.changes.items() if name.startswith("lora_te"))
    extract(models, tmp_path / "out.safetensors", "--min_diff", largest * 1.01)
    assert not [name for name in deltas(tmp_path / "out.safetensors") if name.startswith("lora_te")]
    assert "the text encoder is left out: its weights differ by" in capfd.readouterr().err
    extract(models, tmp_path / "out.safetensors", "--min_diff", largest * 0.99)
    assert [name for name in deltas(tmp_path / "out.safetensors") if name.startswith("lora_te")]


def test_precisions_and_prediction(models, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ("--v2", "--v_parameterization", "--save_precision", "fp16", "--load_precision", "bf16")
    extract(models, out, *words, base="sd2.safetensors", tuned="sd2-tuned.safetensors")
    assert {tensor.dtype for tensor in read_tensors(out).tensors.values()} == {torch.float16}
    record = read_metadata(out)
    assert (record["ss_base_model_version"], record["modelspec.prediction_type"]) == ("sd_v2_v", "v")
    extract(models, out, "--v2", "--no_metadata", base="sd2.safetensors", tuned="sd2-tuned.safetensors")
    assert not [name for name in read_metadata(out) if name.startswith("modelspec")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model_org IN/sd1.safetensors --model_tuned IN/sd1.safetensors", "do not differ"),
        ("--model_org IN/sd1.safetensors --model_tuned IN/sd2.safetensors", "2.x model"),
        ("--model_org IN/no.safetensors --model_tuned IN/not.ckpt", "2 problems"),
        ("--model_org IN/sd1.safetensors", "--model_tuned is missing"),
        ("--model_org IN/sd1.safetensors --model_tuned IN/sd1-lora.safetensors", "a LoRA"),
        ("--model_org a --model_tuned b --sdxl --load_tuned_model_to cuda", "for SDXL models"),
    ],
)
def test_models_that_cannot_be_compared(words, message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [*words.replace("IN", str(models.folder)).split(), "--save_to", "out.safetensors"]
    with pytest.raises(UserError, match=message) as caught:
        run("extract_lora_from_models", *given)
    assert "--pretrained_model_name_or_path" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_models_of_other_structure_or_without_sense(models, tmp_path):
    tiny_ldm(tmp_path, "sd1", layers_per_block=2)
    with pytest.raises(UserError, match="different layers"):
        extract(models, tmp_path / "out.safetensors", tuned=str(tmp_path / "sd1.safetensors"))
    broken = load_file(models.folder / "sd1-tuned.safetensors")
    name = next(name for name in broken if name.endswith("attn1.to_q.weight"))
    broken[name][0, 0] = float("nan")
    header = read_metadata(models.folder / "sd1-tuned.safetensors")
    save_file(broken, tmp_path / "broken.safetensors", metadata=header)
    with pytest.raises(UserError, match="not finite in lora_unet_"):
        extract(models, tmp_path / "out.safetensors", tuned=str(tmp_path / "broken.safetensors"))


# --- DyLoRA


def test_the_smaller_ranks_of_a_dylora(folder):
    case = CASES["dylora split"]
    assert run("extract_lora_from_dylora", *case["args"][1:]) == 0
    assert sorted(path.name for path in folder.glob("dy*")) == case["files"]
    recorded, found = case["example"], read_tensors(folder / "dy-0001.safetensors").tensors
    for name, tensor in found.items():
        facts = recorded["tensors"][name]
        assert list(tensor.shape) == facts["shape"]
        if not name.endswith(".alpha"):
            assert abs(float(tensor.norm()) - facts["norm"]) < 1e-4
    record = read_metadata(folder / "dy-0001.safetensors")
    theirs = recorded["metadata"] | {"ss_network_alpha": "2.0"}
    assert record | theirs == record


def test_each_rank_is_as_strong_as_it_was_in_training(folder):
    """Against the network of the training itself, held at the draw of one block."""
    parts = tiny_parts("sd1", layers_per_block=1)
    network = dylora.create_network(1.0, 8, 4.0, None, parts.text_encoder, parts.unet, unit="2")
    network.initialize(0)
    for module in network.modules_by_name().values():
        torch.nn.init.normal_(module.lora_up.weight, std=0.1)
    network.save_weights(str(folder / "dy.safetensors"), None, {})
    words = ("--model", folder / "dy.safetensors", "--unit", 2, "--save_to", folder / "cut.safetensors")
    run("extract_lora_from_dylora", *words)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    module = network.modules_by_name()[name]
    identity = torch.eye(module.layer.in_features)
    for rank in (2, 4, 6):
        with torch.no_grad():
            change = module._block_change(identity, slice(rank - 2, rank)).T
        found = deltas(folder / f"cut-{rank:04d}.safetensors")[name]
        torch.testing.assert_close(found.float(), change, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("unit", "message"), [(4, "no smaller multiple"), (0, "at least 1"), (None, "--unit is missing")]
)
def test_steps_that_give_nothing(unit, message, folder):
    words = ["--unit", unit] if unit is not None else []
    with pytest.raises(UserError, match=message):
        run("extract_lora_from_dylora", "--model", "a.safetensors", "--save_to", "dy.safetensors", *words)
    assert not list(folder.glob("dy*"))


def test_number_format_and_remarks_are_kept(folder):
    save_file({name: tensor.half() for name, tensor in load_file("a.safetensors").items()}, "half.safetensors")
    run("extract_lora_from_dylora", "--model", "half.safetensors", "--unit", 2, "--save_to", "dy.pt")
    found = read_tensors(folder / "dy-0002.pt").tensors
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert found[f"{QUERY}.lora_down.weight"].shape[0] == 2
    assert len(LAYERS) * 3 == len(found)
    assert sums(folder, a=1).keys() == deltas(folder / "dy-0002.pt").keys()
