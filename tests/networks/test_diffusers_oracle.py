"""The files that are written mean the same to diffusers."""

import json

import pytest
import torch

from tests.networks.test_lora_network import trained, unet_output
from tests.tiny import tiny_parts

pytest.importorskip("peft")


def pipeline(parts):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=None,
        unet=parts.unet,
        scheduler=DDIMScheduler.from_config(json.loads(json.dumps(parts.configs["scheduler"]))),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_computes_the_same(kind, tmp_path):
    parts = tiny_parts(kind)
    before = unet_output(parts)
    network = trained(parts, dim=8, alpha=4.0, conv_dim="3", conv_alpha="2")
    network.save_weights(str(tmp_path / "lora.safetensors"), None, {"ss_network_module": "networks.lora"})
    network.apply_to(parts.text_encoder, parts.unet)
    ours = unet_output(parts)
    network.detach()
    theirs = pipeline(tiny_parts(kind))
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    difference = (unet_output(theirs) - ours).abs().max()
    assert (ours - before).abs().max() > 0.05
    assert difference < 1e-3
    assert torch.isfinite(difference)
