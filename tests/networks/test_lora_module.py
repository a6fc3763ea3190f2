"""One LoRA module: formula, dropouts, norms, precision."""

import math

import pytest
import torch
from torch import nn

from networks.lora_module import LoRAModule
from networks.lora_settings import Dropouts, Rank

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (3, 5, 6)),
    "linear of a vector": (lambda: nn.Linear(6, 10, bias=False), (3, 6)),
    "1x1": (lambda: nn.Conv2d(6, 10, 1), (3, 6, 5, 7)),
    "3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), (3, 6, 5, 7)),
    "3x3 strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (3, 6, 8, 6)),
    "3x3 strided without padding": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=0), (3, 6, 9, 7)),
}


def make(kind="linear", *, rank=4, alpha=3.0, trained=True, **settings):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    module = LoRAModule("lora_unet_x", layer, Rank(rank, alpha), **settings)
    module.initialize(7)
    if trained:
        nn.init.normal_(module.lora_up.weight)
    return layer, module, torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_equals_applying(kind):
    layer, module, x = make(kind, multiplier=0.7)
    module.attach()
    applied = layer(x)
    module.detach()
    with torch.no_grad():
        layer.weight += 0.7 * module.change()
    assert torch.allclose(layer(x), applied, atol=1e-5)


def test_formula():
    layer, module, x = make(rank=4, alpha=2.0, multiplier=3.0)
    weight = layer.weight + 3.0 * (2.0 / 4) * module.lora_up.weight @ module.lora_down.weight
    module.attach()
    assert torch.allclose(layer(x), x @ weight.T + layer.bias, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_module_changes_nothing(kind):
    layer, module, x = make(kind, trained=False)
    before = layer(x)
    module.attach()
    assert torch.equal(layer(x), before)


def test_detaching_restores_the_layer():
    layer, module, x = make()
    before = layer(x)
    module.attach()
    assert not torch.equal(layer(x), before)
    module.detach()
    assert torch.equal(layer(x), before)
    assert "forward" not in vars(layer)


def test_modules_stack_on_one_layer():
    layer, first, x = make()
    second = LoRAModule("second", layer, Rank(2, 2.0))
    nn.init.normal_(second.lora_up.weight)
    before = layer(x)
    first.attach()
    with_first = layer(x)
    second.attach()
    assert torch.allclose(layer(x) - with_first, x @ second.change().T, atol=1e-5)
    second.detach()
    assert torch.equal(layer(x), with_first)
    first.detach()
    assert torch.equal(layer(x), before)


def test_initial_weights_depend_on_seed_and_name_alone():
    _, module, _ = make()
    drawn = module.lora_down.weight.clone()
    torch.manual_seed(99)
    module.initialize(7)
    assert torch.equal(module.lora_down.weight, drawn)
    assert not module.lora_up.weight.any()
    module.initialize(8)
    assert not torch.equal(module.lora_down.weight, drawn)
    module.lora_name = "another"
    module.initialize(7)
    assert not torch.equal(module.lora_down.weight, drawn)


def test_initial_distribution_is_uniform_by_fan_in():
    module = LoRAModule("x", nn.Conv2d(50, 8, 3), Rank(64, 1.0))
    module.initialize(0)
    bound = 1 / math.sqrt(50 * 9)
    weight = module.lora_down.weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_neuron_dropout_keeps_the_mean_and_stops_in_evaluation():
    layer, module, _ = make(rank=8, dropouts=Dropouts(neuron=0.5))
    x = torch.randn(1, 6).expand(20000, 6)
    module.attach()
    torch.manual_seed(0)
    change = layer(x) - (x @ layer.weight.T + layer.bias)
    module.eval()
    exact = layer(x) - (x @ layer.weight.T + layer.bias)
    assert change.std(0).min() > 0
    assert torch.allclose(change.mean(0), exact[0], atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("kind", ["linear", "1x1"])
def test_rank_dropout_masks_rank_components_of_a_sample(kind):
    layer, module, _ = make(kind, rank=8, dropouts=Dropouts(rank=0.25))
    seen = []
    module.lora_up.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    module.attach()
    torch.manual_seed(0)
    x = torch.ones(500, 3, 6) if kind == "linear" else torch.ones(500, 6, 3, 1)
    layer(x)
    module.eval()
    layer(x)
    ratio = (seen[0] / seen[1]).flatten(2) if kind == "1x1" else (seen[0] / seen[1]).movedim(-1, 1)
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio)), "the same component is dropped at every position"
    ratio = ratio[..., 0]
    dropped = ratio == 0
    assert torch.allclose(ratio[~dropped], torch.tensor(1 / 0.75))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert len({tuple(row.tolist()) for row in dropped}) > 50, "samples are masked independently"


def test_module_dropout_follows_torchs_generator():
    layer, module, x = make(dropouts=Dropouts(module=0.3))
    plain = layer(x)
    module.attach()

    def skipped(seed):
        torch.manual_seed(seed)
        return [torch.equal(layer(x), plain) for _ in range(400)]

    first = skipped(1)
    assert sum(first) / 400 == pytest.approx(0.3, abs=0.08)
    assert skipped(1) == first
    module.eval()
    assert not any(skipped(1))


def test_under_autocast_the_weights_stay_float32_and_receive_gradients():
    layer, module, x = make()
    exact = module.change()
    module.attach()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    for weight in (module.lora_down.weight, module.lora_up.weight):
        assert weight.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
    plain = x @ (layer.weight + exact).T + layer.bias
    assert torch.allclose(output.float(), plain, atol=0.05 * plain.abs().max().item())


def test_the_layer_is_no_child_of_its_module():
    _, module, _ = make()
    assert set(module.state_dict()) == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert module.alpha.dtype == torch.float32
    assert module.alpha.ndim == 0


def test_loading_an_alpha_changes_the_strength():
    layer, module, x = make(alpha=4.0)
    other = module.state_dict() | {"alpha": torch.tensor(2, dtype=torch.int64)}
    change = module.change()
    module.load_state_dict(other)
    assert torch.allclose(module.change(), change / 2)
    module.attach()
    assert torch.allclose(layer(x) - (x @ layer.weight.T + layer.bias), x @ (change / 2).T, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_norm_of_the_change(kind):
    _, module, _ = make(kind)
    assert module.change_norm().item() == pytest.approx(module.change().norm().item(), rel=1e-4)
