"""OFT: formula, keys, files, merging, arguments."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.errors import UserError
from networks.oft import create_network, create_network_from_weights
from networks.oft_module import OFTModule
from networks.oft_settings import OFTSettings, read_oft_settings
from tests.networks.test_lora_network import GOLDEN, full_size, same_tensors, unet_output
from tests.tiny import tiny_parts


@pytest.fixture
def parts():
    return tiny_parts("sd1", layers_per_block=1)


def turned(parts, *, blocks=4, constraint=0.01, seed=0, **arguments):
    """A network whose rotations are not the identity."""
    network = create_network(1.0, blocks, constraint, None, parts.text_encoder, parts.unet, **arguments)
    network.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.unet_loras:
        module.oft_blocks.data.copy_(torch.randn(module.oft_blocks.shape, generator=generator) * 0.05)
    return network


LAYERS = {
    "linear": (lambda: nn.Linear(6, 12), (3, 5, 6)),
    "without bias": (lambda: nn.Linear(6, 12, bias=False), (3, 6)),
    "1x1": (lambda: nn.Conv2d(6, 12, 1), (3, 6, 5, 7)),
    "3x3": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1), (3, 6, 8, 6)),
}


def make(kind="linear", *, constraint=1.0, **settings):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    module = OFTModule("oft_unet_x", layer, blocks=3, constraint=constraint, **settings)
    nn.init.normal_(module.oft_blocks, std=0.3)
    return layer, module, torch.randn(shape)


def rotation(module):
    """The whole matrix R by Cayley's formula, block by block, with an inverse."""
    skew = module.oft_blocks.detach().double()
    skew = skew - skew.transpose(1, 2)
    limit = float(module.alpha) * module.layer.weight.shape[0]
    skew = skew * min(1.0, limit / float(skew.norm()))
    identity = torch.eye(skew.shape[1], dtype=torch.float64)
    return torch.block_diag(*((identity + q) @ torch.inverse(identity - q) for q in skew))


@pytest.mark.parametrize("constraint", [10.0, 0.01])
@pytest.mark.parametrize("kind", LAYERS)
def test_formula(kind, constraint):
    layer, module, x = make(kind, constraint=constraint)
    matrix = rotation(module)
    assert torch.allclose(matrix @ matrix.T, torch.eye(12, dtype=torch.float64), atol=1e-6)
    rotated = (matrix.T @ layer.weight.detach().double().flatten(1)).reshape(layer.weight.shape).float()
    module.attach()
    applied = layer(x)
    module.detach()
    assert not torch.allclose(layer(x), applied, atol=1e-3)
    with torch.no_grad():
        layer.weight.copy_(rotated)
    assert torch.allclose(layer(x), applied, atol=1e-5)


def test_the_constraint_holds_the_norm():
    layer, module, _ = make(constraint=0.01)
    # For small Q, R - I is 2 Q; its norm is held to alpha times outputs.
    assert float(module.turn().detach().norm()) == pytest.approx(2 * 0.01 * 12, rel=0.01)
    assert float(make(constraint=10.0)[1].turn().detach().norm()) > 0.5


@pytest.mark.parametrize("constraint", [0.0, 0.01, 2.0])
def test_lycoris_reads_the_same_rotation(constraint):
    functional = pytest.importorskip("lycoris.functional.diag_oft")
    layer, module, _ = make(constraint=constraint or 100.0)
    theirs = functional.diff_weight(
        layer.weight.detach(), module.oft_blocks.detach(), None, constraint=constraint * 12, backend="torch"
    )
    assert torch.allclose(module.change().detach(), theirs, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_module_changes_nothing_and_gets_a_gradient(kind):
    layer, module, x = make(kind)
    module.initialize(3)
    before = layer(x)
    module.attach()
    assert torch.equal(layer(x), before)
    # Not the norm of the output: rotations keep that.
    layer(x).exp().sum().backward()
    assert torch.isfinite(module.oft_blocks.grad).all()
    assert module.oft_blocks.grad.abs().max() > 0


def test_nothing_waits_for_the_gpu():
    """These operations read a result on the CPU; on a GPU they wait for everything before them."""
    called = set()

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    layer, module, x = make()
    module.attach()
    with Noting():
        layer(x).exp().sum().backward()
    assert "_linalg_solve_ex" in called
    assert not called & {"_local_scalar_dense", "_linalg_check_errors", "is_nonzero"}


def test_strength():
    layer, module, x = make(multiplier=0.5)
    half = module.change() * 0.5
    before = layer(x)
    module.attach()
    assert torch.allclose(layer(x) - before, x @ half.T, atol=1e-5)


def test_small_rotations_survive_bfloat16():
    layer, module, x = make(constraint=1e-4)
    plain = layer(x)
    exact = module.turn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.turn(), exact)
        module.attach()
        change = layer(x).float() - plain
    # 1e-4 is far below the resolution of bfloat16 beside 1, so rounding R itself would lose it.
    assert change.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dim4", {}),
        ("dim4", {"enable_all_linear": "False", "enable_conv": "0"}),
        ("dim4_all_linear", {"enable_all_linear": "True"}),
        ("dim4_conv", {"enable_conv": "True"}),
    ],
)
def test_keys_and_shapes_of_the_full_size_model(name, arguments):
    """A listed difference: the reference takes any text for true, so there "False" would be."""
    unet, text_encoder = full_size("sd1")
    with torch.device("meta"):
        network = create_network(1.0, 4, 1e-3, None, text_encoder, unet, **arguments)
    expected = json.loads((GOLDEN / f"oft_keys_sd1_{name}.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == expected["keys"]
    assert len(network.unet_loras) == expected["unet_modules"]
    assert network.text_encoder_loras == []


def test_a_new_network_changes_nothing_and_merging_equals_applying(parts):
    before = unet_output(parts)
    fresh = create_network(1.0, 4, 1e-3, None, parts.text_encoder, parts.unet, enable_conv="true")
    fresh.initialize(0)
    fresh.apply_to(parts.text_encoder, parts.unet)
    assert torch.equal(unet_output(parts), before)
    fresh.detach()
    network = turned(parts, enable_conv="true", enable_all_linear="true")
    network.set_multiplier(0.8)
    network.apply_to(parts.text_encoder, parts.unet)
    applied = unet_output(parts)
    assert (applied - before).abs().max() > 1e-2
    network.detach()
    network.merge_to(parts.text_encoder, parts.unet, network.state_dict())
    assert torch.allclose(unet_output(parts), applied, atol=1e-5)


def test_merging_leaves_modules_alone_that_the_file_has_not(parts):
    network = turned(parts)
    name = network.unet_loras[0].lora_name
    weights = {key: tensor for key, tensor in network.state_dict().items() if key.startswith(name + ".")}
    other = network.unet_loras[1].layer.weight
    before = other.clone()
    first = network.unet_loras[0].layer.weight.clone()
    network.merge_to(parts.text_encoder, parts.unet, weights)
    assert torch.equal(other, before)
    assert not torch.equal(network.unet_loras[0].layer.weight, first)


def test_files(parts, tmp_path):
    network = turned(parts, blocks=2, constraint=0.003, enable_conv="true")
    file = tmp_path / "oft.safetensors"
    network.save_weights(str(file), None, {"ss_network_module": "networks.oft"})
    assert same_tensors(load_file(file), network.state_dict())
    again = create_network(1.0, 2, 0.5, None, None, parts.unet, enable_conv="true")
    assert str(again.load_weights(str(file))) == "<All keys matched successfully>"
    assert again.unet_loras[0].constraint == pytest.approx(0.003)
    other, weights = create_network_from_weights(0.5, str(file), None, parts.text_encoder, parts.unet)
    other.load_weights(str(file))
    assert same_tensors(other.state_dict(), weights)
    assert {module.multiplier for module in other.unet_loras} == {0.5}


def test_a_missing_alpha_is_the_default(parts, tmp_path):
    tensors = {name: tensor for name, tensor in turned(parts).state_dict().items() if not name.endswith("alpha")}
    file = tmp_path / "oft.safetensors"
    save_file(tensors, file)
    network, _ = create_network_from_weights(1.0, str(file), None, None, parts.unet)
    network.load_weights(str(file))
    assert network.unet_loras[0].constraint == pytest.approx(1e-3)


def test_other_files_are_refused(parts, tmp_path):
    file = tmp_path / "x.safetensors"
    for tensors, what in (
        ({"lora_unet_x.oft_blocks": torch.ones(2, 2, 2)}, "OFT network of another program"),
        ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "the file is a LoRA network"),
        ({"oft_unet_x.oft_blocks": torch.ones(2, 2, 2)}, "none of the 1 modules"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=what):
            create_network_from_weights(1.0, str(file), None, None, parts.unet)
    turned(parts, blocks=2).save_weights(str(file), None, None)
    with pytest.raises(UserError, match="--network_dim 2"):
        create_network(1.0, 4, 1e-3, None, None, parts.unet).load_weights(str(file))


def test_blocks_that_do_not_divide_the_outputs(parts):
    with pytest.raises(UserError, match="cannot be divided into 5 blocks") as caught:
        create_network(1.0, 5, 1e-3, None, None, parts.unet)
    assert "1, 2, 4, 8, 16, 32" in str(caught.value)


def test_groups(parts):
    network = turned(parts)
    groups, names = network.prepare_optimizer_params(1e-5, None, 1e-3)
    assert (names, groups[0]["lr"]) == (["unet"], 1e-3)
    assert len(groups[0]["params"]) == len(network.unet_loras)
    with pytest.raises(UserError, match="no modules for the parts"):
        network.apply_to(parts.text_encoder, parts.unet, True, False)


# Arguments


def test_settings():
    assert read_oft_settings(None, None, None, {}) == OFTSettings(blocks=4, constraint=1e-3)
    given = {"enable_all_linear": "True", "enable_conv": "False", "dropout": None}
    assert read_oft_settings(8, 0.01, 0.0, given) == OFTSettings(blocks=8, constraint=0.01, all_linear=True)


def test_all_problems_are_reported_together():
    arguments = {"enable_covn": "1", "enable_conv": "perhaps", "conv_dim": "4", "module_dropout": "0.1"}
    with pytest.raises(UserError) as caught:
        read_oft_settings(0, 0.0, 0.1, arguments)
    text = str(caught.value)
    for what in (
        "Did you mean enable_conv?",
        "enable_conv=perhaps is not true or false",
        "has no argument 'conv_dim'",
        "has no argument 'module_dropout'",
        "networks.oft has no dropout",
        "0 blocks are not possible",
        "an alpha of 0 would allow no rotation",
    ):
        assert what in text
