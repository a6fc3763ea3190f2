"""What DyLoRA and LoRA-FA do in their own way."""

import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from networks import dylora, lora, lora_fa
from networks.lora_module import LoRAModule, Variant, draw_uniform
from networks.lora_settings import Dropouts, Rank, read_settings
from tests.networks.test_lora_network import full_size, golden, same_tensors, unet_output
from tests.tiny import tiny_parts

MODULES = {"dylora": dylora, "lora_fa": lora_fa}


@pytest.fixture
def parts():
    return tiny_parts("sd1", layers_per_block=1)


@pytest.mark.parametrize("name", MODULES)
def test_keys_and_shapes_are_those_of_a_lora(name):
    unet, text_encoder = full_size("sd1")
    for golden_name, arguments in (("sd1_rank4", {}), ("sd1_rank4_conv4", {"conv_dim": "4", "conv_alpha": "1"})):
        network = MODULES[name].create_network(1.0, 4, 1.0, None, text_encoder, unet, **arguments)
        found = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        assert found == golden(golden_name)["keys"]


@pytest.mark.parametrize("name", MODULES)
def test_a_new_network_changes_nothing_and_merging_equals_applying(name, parts):
    before = unet_output(parts)
    network = MODULES[name].create_network(0.7, 4, 2.0, None, parts.text_encoder, parts.unet, conv_dim="4")
    network.initialize(1)
    network.apply_to(parts.text_encoder, parts.unet)
    network.train()
    assert torch.equal(unet_output(parts), before)
    for module in network.modules_by_name().values():
        nn.init.normal_(module.lora_up.weight, std=0.05)
    network.eval()
    applied = unet_output(parts)
    assert (applied - before).abs().max() > 1e-2
    network.detach()
    network.merge_to(parts.text_encoder, parts.unet, network.state_dict())
    assert torch.allclose(unet_output(parts), applied, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_files_are_shared_with_lora(name, parts, tmp_path):
    """Also without alphas, which then are the rank."""
    network = lora.create_network(1.0, 6, 3.0, None, parts.text_encoder, parts.unet)
    network.initialize(1)
    file = tmp_path / "lora.safetensors"
    save_file({key: value for key, value in network.state_dict().items() if not key.endswith("alpha")}, file)
    loaded, weights = MODULES[name].create_network_from_weights(1.0, str(file), None, parts.text_encoder, parts.unet)
    assert str(loaded.load_weights(str(file))) == "<All keys matched successfully>"
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in weights.items())
    assert {module.scale for module in loaded.unet_loras} == {1.0}
    loaded.save_weights(str(file), None, {})
    again = lora.create_network_from_weights(1.0, str(file), None, parts.text_encoder, parts.unet)[0]
    again.load_weights(str(file))
    assert same_tensors(again.state_dict(), load_file(file))


# DyLoRA


def blocks_module(layer, *, rank=6, unit=2, name="x", **settings):
    variant = Variant(draw_down=draw_uniform, unit=unit)
    module = LoRAModule(name, layer, Rank(rank, 3.0), variant=variant, **settings)
    module.initialize(0)
    nn.init.normal_(module.lora_up.weight)
    module.attach()
    return module


def used_ranks(module):
    """The ranks whose up weights got a gradient, as ``(first, end)``."""
    used = module.lora_up.weight.grad.flatten(1).abs().sum(0).nonzero().flatten().tolist()
    assert used == list(range(used[0], used[-1] + 1))
    return used[0], used[-1] + 1


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 7), lambda: nn.Conv2d(5, 7, 3, padding=1, stride=2)])
def test_a_step_uses_the_ranks_up_to_the_drawn_block_and_trains_the_block(build):
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 5, 6, 6)
    plain = layer(x)
    module = blocks_module(layer, multiplier=0.5)
    for seed in range(6):
        torch.manual_seed(seed)
        module.zero_grad()
        output = layer(x)
        output.sum().backward()
        first, end = used_ranks(module)
        assert (first % 2, end - first) == (0, 2)
        assert not module.lora_down.weight.grad[:first].any()
        assert not module.lora_down.weight.grad[end:].any()
        assert module.lora_down.weight.grad[first:end].any()
        down, up = module.lora_down.weight.detach()[:end], module.lora_up.weight.detach()[:, :end]
        weight = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape) * (3 / 6) * math.sqrt(6 / end)
        changed = layer.weight.detach() + 0.5 * weight
        expected = (
            nn.functional.linear(x, changed, layer.bias)
            if isinstance(layer, nn.Linear)
            else nn.functional.conv2d(x, changed, layer.bias, stride=2, padding=1)
        )
        assert torch.allclose(output, expected, atol=1e-5)
    module.eval()
    assert torch.allclose(layer(x) - plain, module.change().new_tensor(0) + 0.5 * full_change(module, x), atol=1e-5)


@torch.no_grad()
def full_change(module, x):
    return module.lora_up(module.lora_down(x)) * module.scale


def test_blocks_are_drawn_by_address():
    layers = [nn.Linear(5, 7), nn.Linear(5, 7)]
    modules = [blocks_module(layer, rank=4, unit=1, name=name) for layer, name in zip(layers, "ab", strict=True)]
    x = torch.randn(3, 5)
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        for module, layer in zip(modules, layers, strict=True):
            module.zero_grad()
            # Other draws and a second call change nothing.
            torch.rand(seed % 3)
            (layer(x) + layer(x)).sum().backward()
        found.append(tuple(used_ranks(module)[0] for module in modules))
    assert set(found) == {(first, second) for first in range(4) for second in range(4)}
    assert all(30 < count < 70 for count in Counter(first for first, _ in found).values())
    state = torch.get_rng_state()
    layers[0](x)
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputing_draws_the_same_block():
    layer = nn.Linear(5, 7)
    module = blocks_module(layer, dropouts=Dropouts(neuron=0.3, rank=0.3))
    x = torch.randn(3, 5, requires_grad=True)
    for seed in range(5):
        gradients = []
        for compute in (layer, lambda value: checkpoint(layer, value, use_reentrant=False)):
            torch.manual_seed(seed)
            module.zero_grad()
            compute(x).square().sum().backward()
            gradients.append(module.lora_down.weight.grad.clone())
        assert torch.equal(*gradients)


def test_arguments_of_dylora():
    def read(dim, **arguments):
        return read_settings(dim, 2.0, None, arguments, module="networks.dylora")

    assert read(6).unit == 1
    assert read(6, unit="3", conv_dim="6").conv == Rank(6, 2.0)
    assert read(6, unit="3", conv_dim="6", conv_alpha="1").conv == Rank(6, 1.0)
    assert read(6, conv_dim="0").conv is None
    settings = read(8, unit="2", rank_dropout="0.1", loraplus_lr_ratio="4")
    assert (settings.dropouts.rank, settings.loraplus_unet) == (0.1, 4.0)
    for arguments, what in (
        ({"unit": "4"}, "unit=4 does not divide the rank 6"),
        ({"unit": "0"}, "unit=0 is not possible"),
        ({"conv_dim": "4"}, "conv_dim=4 is not the rank of the other layers, 6"),
        ({"conv_alpha": "4"}, "conv_alpha has no ranks"),
        ({"block_dims": "4"}, "networks.dylora has no argument 'block_dims'"),
        ({"untis": "2"}, "Did you mean unit?"),
    ):
        with pytest.raises(UserError, match=what):
            read(6, **arguments)
    with pytest.raises(UserError, match=r"it belongs to networks\.dylora"):
        read_settings(4, 1.0, None, {"unit": "2"})


def test_the_unit_divides_the_ranks_of_a_file(parts, tmp_path):
    file = tmp_path / "lora.safetensors"
    lora.create_network(1.0, 6, 3.0, None, None, parts.unet).save_weights(str(file), None, None)
    network, _ = dylora.create_network_from_weights(1.0, str(file), None, None, parts.unet, unit="3")
    assert {module.variant.unit for module in network.unet_loras} == {3}
    with pytest.raises(UserError, match="unit=4 does not divide the rank 6"):
        dylora.create_network_from_weights(1.0, str(file), None, None, parts.unet, unit="4")


# LoRA-FA


def test_down_is_drawn_from_a_normal_distribution_and_stays(parts):
    network = lora_fa.create_network(1.0, 8, 8.0, None, parts.text_encoder, parts.unet, conv_dim="8")
    network.initialize(3)
    for module in network.unet_loras[:12]:
        down = module.lora_down.weight
        assert float(down.std()) == pytest.approx(math.sqrt(2 / (down.shape[1] + 8)), rel=0.15)
        assert float(down.mean()) == pytest.approx(0, abs=0.06)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1.0)
    assert names == ["textencoder", "unet"]
    ups = {id(module.lora_up.weight) for module in network.modules_by_name().values()}
    assert {id(parameter) for group in groups for parameter in group["params"]} == ups
    assert {id(parameter) for parameter in network.get_trainable_params()} == ups


def test_norms_are_limited_by_up_alone(parts):
    network = lora_fa.create_network(1.0, 4, 4.0, None, None, parts.unet)
    network.initialize(3)
    for module in network.unet_loras:
        nn.init.normal_(module.lora_up.weight)
    downs = [module.lora_down.weight.clone() for module in network.unet_loras]
    scaled, _, largest = network.apply_max_norm_regularization(0.5)
    assert scaled == len(network.unet_loras)
    assert largest == pytest.approx(0.5)
    for module, down in zip(network.unet_loras, downs, strict=True):
        assert torch.equal(module.lora_down.weight, down)
        assert module.change().norm().item() == pytest.approx(0.5, rel=1e-3)


def test_arguments_of_lora_fa():
    settings = read_settings(4, 1.0, None, {"mid_lr_weight": "2", "conv_dim": "2"}, module="networks.lora_fa")
    assert settings.block_lr[12] == 2.0
    with pytest.raises(UserError, match="only the up weights are trained"):
        read_settings(4, 1.0, None, {"loraplus_lr_ratio": "2"}, module="networks.lora_fa")
