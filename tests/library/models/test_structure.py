import pytest

from library.errors import UserError
from library.models.structure import (
    CONFIG_KEY,
    carried_structure,
    shipped_config,
    stated_structure,
    text_encoder_config,
    unet_config,
    vae_config,
)
from tests.library.models.test_ldm_keys import full_size
from tests.tiny import tiny_parts


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_shapes_of_the_full_models_give_their_configurations(family):
    assert unet_config(shapes(full_size(f"unet_{family}")), family, where="") == shipped_config(f"unet_{family}")
    assert vae_config(shapes(full_size("vae")), where="") == shipped_config("vae")
    text = text_encoder_config(shapes(full_size(f"text_encoder_{family}")), family, where="")
    assert text == shipped_config(f"text_encoder_{family}")


def test_a_short_wide_inpainting_unet_is_read_from_its_shapes():
    import torch
    from diffusers import UNet2DConditionModel

    built = shipped_config("unet_sd1") | {
        "block_out_channels": [64, 128, 128],
        "layers_per_block": [1, 2, 1],
        "in_channels": 9,
        "cross_attention_dim": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(built)

    assert unet_config(shapes(unet.state_dict()), "sd1", where="") == built


def test_what_shapes_cannot_tell_is_refused_with_the_number():
    parts = tiny_parts("sd1", channels=(16, 32, 64, 64))
    with pytest.raises(UserError, match="16 channels do not fit the usual number of groups"):
        unet_config(shapes(parts.unet.state_dict()), "sd1", where="model.safetensors")


def test_the_full_models_carry_no_configuration_and_small_ones_do():
    full = {part: shapes(full_size(name)) for part, name in PARTS.items()}
    configs = {part: shipped_config(name) | {"_name_or_path": "somewhere"} for part, name in PARTS.items()}
    assert stated_structure(configs, full, "sd1") is None

    parts = tiny_parts("sd1")
    modules = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoder}
    tiny = {part: shapes(module.state_dict()) for part, module in modules.items()}
    stated = stated_structure({part: dict(parts.configs[part]) for part in PARTS}, tiny, "sd1")
    carried = carried_structure({CONFIG_KEY: stated}, where="")
    assert carried["unet"]["norm_num_groups"] == 8
    assert not any(name.startswith("_") for config in carried.values() for name in config)


def test_a_full_shape_with_other_heads_carries_its_configuration():
    full = {part: shapes(full_size(name)) for part, name in PARTS.items()}
    configs = {part: shipped_config(name) for part, name in PARTS.items()}
    configs["unet"]["attention_head_dim"] = 4
    assert stated_structure(configs, full, "sd1") is not None


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[1]",
        '{"unet": 3}',
        '{"text_encoder": {"hidden_size": 64}}',
        '{"text_encoder": {"num_hidden_layers": "two"}}',
        '{"text_encoder": {"num_hidden_layers": true}}',
    ],
)
def test_a_damaged_configuration_is_reported(text):
    with pytest.raises(UserError, match="configuration"):
        carried_structure({CONFIG_KEY: text}, where="model.safetensors")


PARTS = {"unet": "unet_sd1", "vae": "vae", "text_encoder": "text_encoder_sd1"}
