"""The words that a LoRA changes most."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from tests.networks.test_lora_network import trained
from tests.networks.tool_runs import run
from tests.tiny import tiny_ldm, tiny_parts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrogated")
    tiny_ldm(folder, "sd1", layers_per_block=1)
    network = trained(tiny_parts("sd1", layers_per_block=1), dim=2, alpha=20.0)
    network.save_weights(str(folder / "lora.safetensors"), None, {"ss_base_model_version": "sd_v1"})
    return folder


def interrogate(place, *words):
    given = ("--sd_model", place / "sd1.safetensors", "--model", place / "lora.safetensors", "--batch_size", 2048)
    return run("lora_interrogator", *given, *words)


@torch.no_grad()
def change(place, token: int, layer: int) -> float:
    """The change of one token's encoding, by a text encoder whose weights were changed by the plain formula."""
    outputs = []
    tensors = load_file(place / "lora.safetensors")
    for strength in (0.0, 1.0):
        text = tiny_parts("sd1", layers_per_block=1).text_encoder
        for name, module in text.named_modules():
            key = "lora_te_text_model_" + name.replace(".", "_")
            if f"{key}.alpha" in tensors:
                up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
                module.weight += strength * float(tensors[f"{key}.alpha"]) / down.shape[0] * up @ down
        states = text(torch.tensor([[49406, token, 49407]]), output_hidden_states=True).hidden_states
        outputs.append(text.final_layer_norm(states[-layer]))
    return float((outputs[1] - outputs[0]).abs().mean())


def test_the_largest_changes_come_first(place, capsys):
    assert interrogate(place, "--clip_skip=2") == 0
    out = capsys.readouterr().out
    assert "the 100 of 49408 tokens that lora.safetensors changes most" in out
    found = re.findall(r"^\[ *(\d+)\]: +(\d+) (\S+) *: ([\d.]+)$", out, re.MULTILINE)
    assert [int(row[0]) for row in found] == list(range(100))
    sizes = [float(row[3]) for row in found]
    assert sizes == sorted(sizes, reverse=True)
    for _, token, _, size in (found[0], found[99]):
        assert change(place, int(token), 2) == pytest.approx(float(size), abs=2e-5)
    # None of some others is larger.
    assert all(change(place, token, 2) <= sizes[0] + 2e-5 for token in (320, 1125, 40000))


def test_what_it_cannot_tell_about(place, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(place / "lora.safetensors").items() if "unet" in name}
    save_file(tensors, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="no part for the text encoder"):
        interrogate(place, "--model", tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="2 problems"):
        run("lora_interrogator", "--sd_model", place / "no.ckpt", "--model", place / "no.safetensors")
    with pytest.raises(UserError, match="Leave out --v2"):
        interrogate(place, "--v2")
    save_file(tensors, tmp_path / "two.safetensors", metadata={"ss_base_model_version": "sd_v2"})
    with pytest.raises(UserError, match="made for sd_v2"):
        interrogate(place, "--model", tmp_path / "two.safetensors")
