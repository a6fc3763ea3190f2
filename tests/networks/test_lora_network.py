"""LoRA networks on small models: keys, attaching, training, files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import tensor_hashes
from library.models.checkpointing import use_text_checkpointing
from networks.lora import create_network, create_network_from_weights
from tests.tiny import CONFIGS, tiny_parts

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"lora_keys_{name}.json").read_text())


def full_size(family):
    """U-Net and text encoder of full size, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(part):
        return json.loads((CONFIGS / f"{part}_{family}.json").read_text())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config("unet"))
        return unet, CLIPTextModel(CLIPTextConfig(**config("text_encoder")))


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def kind(request):
    return request.param


@pytest.fixture
def parts(kind):
    return tiny_parts(kind)


@pytest.fixture
def sd1():
    return tiny_parts("sd1")


def trained(parts, *, dim=4, alpha=2.0, seed=0, text=True, **arguments):
    """A network whose up weights are not zero."""
    network = create_network(1.0, dim, alpha, None, parts.text_encoder if text else None, parts.unet, **arguments)
    network.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules_by_name().values():
        up = module.lora_up.weight.data
        up.copy_(torch.randn(up.shape, generator=generator) * 0.05)
    return network


@torch.no_grad()
def unet_output(parts):
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.randint(0, 49000, (2, 77), generator=generator)
    context = parts.text_encoder(ids).last_hidden_state
    return parts.unet(noisy, torch.tensor([10, 500]), context).sample


@pytest.mark.parametrize(
    ("family", "name", "arguments"),
    [
        ("sd1", "sd1_rank4", {}),
        ("sd1", "sd1_rank4_conv4", {"conv_dim": "4", "conv_alpha": "1"}),
        ("sd2", "sd2_from_diffusers_rank4", {}),
    ],
)
def test_keys_and_shapes_of_full_size_models(family, name, arguments):
    unet, text_encoder = full_size(family)
    network = create_network(1.0, 4, 1.0, None, text_encoder, unet, **arguments)
    expected = golden(name)
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == expected["keys"]
    assert len(network.text_encoder_loras) == expected["text_encoder_modules"]
    assert len(network.unet_loras) == expected["unet_modules"]
    # A listed difference: the reference writes int64 alphas when --network_alpha is not given.
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(("name", "arguments"), [("sd2_rank4", {}), ("sd2_rank4_conv4", {"conv_dim": "4"})])
def test_sd2_differs_from_a_checkpoints_network_only_in_the_form_of_projections(name, arguments):
    unet, text_encoder = full_size("sd2")
    network = create_network(1.0, 4, 1.0, None, text_encoder, unet, **arguments)
    own = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    expected = golden(name)["keys"]
    assert own.keys() == expected.keys()
    differing = {key for key in own if own[key] != expected[key]}
    assert differing == {key for key in own if ("proj_in" in key or "proj_out" in key) and "alpha" not in key}
    assert all([*own[key], 1, 1] == expected[key] for key in differing)


def test_conv_targets_do_not_leak_into_the_next_network(sd1):
    with_conv = create_network(1.0, 4, 1.0, None, None, sd1.unet, conv_dim="2")
    without = create_network(1.0, 4, 1.0, None, None, sd1.unet)
    assert any("resnets" in name for name in with_conv.modules_by_name())
    assert not any("resnets" in name for name in without.modules_by_name())


def test_a_new_network_changes_nothing_and_a_trained_one_does(parts):
    before = unet_output(parts)
    network = create_network(1.0, 4, 1.0, None, parts.text_encoder, parts.unet, conv_dim="4")
    network.initialize(0)
    network.apply_to(parts.text_encoder, parts.unet)
    assert torch.equal(unet_output(parts), before)
    torch.nn.init.normal_(network.unet_loras[3].lora_up.weight)
    assert not torch.equal(unet_output(parts), before)
    network.detach()
    assert torch.equal(unet_output(parts), before)


def test_merging_equals_applying(parts):
    network = trained(parts, conv_dim="3", conv_alpha="2")
    network.set_multiplier(0.8)
    before = unet_output(parts)
    network.apply_to(parts.text_encoder, parts.unet)
    applied = unet_output(parts)
    network.detach()
    assert (applied - before).abs().max() > 1e-2
    network.merge_to(parts.text_encoder, parts.unet, network.state_dict())
    assert torch.allclose(unet_output(parts), applied, atol=1e-5)


def test_only_one_part(sd1):
    network = trained(sd1)
    network.apply_to(sd1.text_encoder, sd1.unet, False, True)
    assert {name.split("_text")[0][:9] for name in network.state_dict()} == {"lora_unet"}
    both_off = trained(sd1)
    with pytest.raises(UserError, match="no modules for the parts"):
        both_off.apply_to(sd1.text_encoder, sd1.unet, False, False)


def test_a_text_encoder_with_nested_layers_gets_the_same_names(sd1):
    class Nested(torch.nn.Module):
        def __init__(self, text_model):
            super().__init__()
            self.text_model = text_model

    flat = create_network(1.0, 4, 1.0, None, sd1.text_encoder, sd1.unet)
    nested = create_network(1.0, 4, 1.0, None, Nested(sd1.text_encoder), sd1.unet)
    assert list(flat.state_dict()) == list(nested.state_dict())


# Files


def same_tensors(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_saved_file_loads_back_with_metadata_and_hashes(parts, tmp_path):
    network = trained(parts, conv_dim="2")
    file = tmp_path / "lora.safetensors"
    given = {"ss_v2": "False", "modelspec.title": "x"}
    network.save_weights(str(file), None, given)
    assert given == {"ss_v2": "False", "modelspec.title": "x"}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    model_hash, legacy_hash = tensor_hashes(tensors, metadata)
    assert metadata == {**given, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
    other = create_network(1.0, 4, 1.0, None, parts.text_encoder, parts.unet, conv_dim="2")
    assert str(other.load_weights(str(file))) == "<All keys matched successfully>"
    assert same_tensors(other.state_dict(), network.state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_saved_precision(sd1, tmp_path, suffix):
    network = trained(sd1, text=False)
    file = tmp_path / f"lora{suffix}"
    network.save_weights(str(file), torch.float16, None)
    tensors = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert network.unet_loras[0].lora_up.weight.dtype == torch.float32
    again = trained(sd1, text=False, seed=1)
    again.load_weights(str(file))
    assert torch.allclose(again.unet_loras[0].lora_up.weight, network.unet_loras[0].lora_up.weight, atol=1e-3)


def test_weights_that_are_not_finite_are_not_written(sd1, tmp_path):
    network = trained(sd1)
    with torch.no_grad():
        network.unet_loras[0].lora_up.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    assert not list(tmp_path.iterdir())


def reshaped(tensors, *, to_4d):
    def convert(name, tensor):
        if "proj_" not in name or "alpha" in name or "lora_te" in name:
            return tensor
        return tensor[:, :, None, None] if to_4d else tensor.flatten(1)

    return {name: convert(name, tensor).contiguous() for name, tensor in tensors.items()}


def test_projections_are_read_in_two_and_four_dimensions(parts, kind, tmp_path):
    network = trained(parts)
    tensors = reshaped(network.state_dict(), to_4d=kind == "sd2")
    assert not same_tensors(tensors, network.state_dict())
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    other = create_network(1.0, 4, 1.0, None, parts.text_encoder, parts.unet)
    assert str(other.load_weights(str(file))) == "<All keys matched successfully>"
    assert same_tensors(other.state_dict(), network.state_dict())
    from_file, weights = create_network_from_weights(1.0, str(file), None, parts.text_encoder, parts.unet)
    before = unet_output(parts)
    from_file.merge_to(parts.text_encoder, parts.unet, weights)
    merged = unet_output(parts)
    assert (merged - before).abs().max() > 1e-2


def test_a_missing_alpha_is_the_rank_and_an_integer_one_is_read(sd1, tmp_path):
    network = trained(sd1, text=False)
    tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(".alpha")}
    name = network.unet_loras[1].lora_name
    file = tmp_path / "lora.safetensors"
    save_file({**tensors, f"{name}.alpha": torch.tensor(3)}, file)
    for other in (
        create_network(1.0, 4, 1.0, None, None, sd1.unet),
        create_network_from_weights(1.0, str(file), None, None, sd1.unet)[0],
    ):
        other.load_weights(str(file))
        assert other.unet_loras[0].scale == 1.0
        assert other.unet_loras[1].scale == 0.75
        assert other.state_dict()[f"{name}.alpha"].dtype == torch.float32


def test_another_rank_is_refused_naming_both_and_the_remedy(sd1, tmp_path):
    file = tmp_path / "lora.safetensors"
    trained(sd1, dim=8).save_weights(str(file), None, {})
    network = create_network(1.0, 4, 1.0, None, sd1.text_encoder, sd1.unet)
    with pytest.raises(UserError) as caught:
        network.load_weights(str(file))
    text = str(caught.value)
    assert "lora_te_text_model_encoder_layers_0_self_attn" in text
    assert "rank 8 in the file and rank 4 here" in text
    assert "--dim_from_weights" in text


def test_another_width_is_refused(sd1, tmp_path):
    file = tmp_path / "lora.safetensors"
    trained(tiny_parts("sd2")).save_weights(str(file), None, {})
    with pytest.raises(UserError, match="made for a model of another width|in this model"):
        create_network(1.0, 4, 1.0, None, sd1.text_encoder, sd1.unet).load_weights(str(file))


@pytest.mark.parametrize(
    ("key", "kind_named"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("oft_unet_x.oft_blocks", "OFT"),
        ("lora_te1_text_model_x.lora_down.weight", "SDXL"),
        ("unet.down_blocks.0.to_q.lora_A.weight", "PEFT"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("model.diffusion_model.x", "whole model"),
        ("emb_params", "textual inversion"),
        ("x", "no network that is known"),
    ],
)
def test_a_file_of_another_kind_is_named(sd1, tmp_path, key, kind_named):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match=kind_named):
        create_network(1.0, 4, 1.0, None, None, sd1.unet).load_weights(str(file))
    with pytest.raises(UserError, match=kind_named):
        create_network_from_weights(1.0, str(file), None, None, sd1.unet)


def test_ranks_from_a_file(parts, tmp_path):
    dims = [2 + block % 3 for block in range(25)]
    network = trained(parts, block_dims=",".join(map(str, dims)), conv_dim="1")
    file = tmp_path / "lora.safetensors"
    network.save_weights(str(file), None, {})
    other, weights = create_network_from_weights(
        0.5, str(file), None, parts.text_encoder, parts.unet, rank_dropout="0.1", for_inference=True
    )
    assert {name: tensor.shape for name, tensor in other.state_dict().items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    assert {module.multiplier for module in other.unet_loras} == {0.5}
    assert {module.dropouts.rank for module in other.unet_loras} == {0.1}
    assert not other.training
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_rank_arguments_beside_a_file_are_announced(sd1, tmp_path, caplog):
    file = tmp_path / "lora.safetensors"
    trained(sd1).save_weights(str(file), None, {})
    create_network_from_weights(1.0, str(file), None, sd1.text_encoder, sd1.unet, conv_dim="4")
    assert "conv_dim not used" in caplog.text


def test_a_file_without_a_layer_in_the_model(sd1, tmp_path, caplog):
    tensors = trained(sd1, text=False).state_dict()
    stray = {f"lora_unet_other.{part}.weight": torch.ones(4, 4) for part in ("lora_down", "lora_up")}
    some, none = tmp_path / "some.safetensors", tmp_path / "none.safetensors"
    save_file({**tensors, **stray}, some)
    save_file(stray, none)
    create_network_from_weights(1.0, str(some), None, sd1.text_encoder, sd1.unet)
    assert "1 of" in caplog.text
    assert "lora_unet_other" in caplog.text
    with pytest.raises(UserError, match="none of the 1 modules"):
        create_network_from_weights(1.0, str(none), None, sd1.text_encoder, sd1.unet)


# Training


def test_groups_of_the_two_parts(sd1):
    network = trained(sd1)
    groups, names = network.prepare_optimizer_params(1e-5, None, 1e-3)
    assert names == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-3]
    sizes = [2 * len(network.text_encoder_loras), 2 * len(network.unet_loras)]
    assert [len(group["params"]) for group in groups] == sizes


def test_loraplus_groups(sd1):
    network = trained(sd1, loraplus_lr_ratio="16", loraplus_text_encoder_lr_ratio="2")
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1.0)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 2e-4, 1e-3, 16e-3])
    ups = {id(module.lora_up.weight) for module in network.unet_loras}
    assert {id(parameter) for parameter in groups[3]["params"]} == ups


def test_groups_of_blocks(sd1):
    network = trained(sd1, down_lr_weight="0,0.5,1,1,1,1,1,1,1,1,1,1", mid_lr_weight="2", up_lr_weight="zeros")
    groups, names = network.prepare_optimizer_params(0, 1e-3, 1.0)
    assert names == [f"unet_block{block}" for block in (1, 2, 4, 5, 7, 8, 12)]
    assert [group["lr"] for group in groups] == pytest.approx([0.5e-3, *[1e-3] * 5, 2e-3])
    assert not any("up_blocks" in name for name in network.modules_by_name())


def test_a_part_without_learning_rate_is_frozen_but_saved(sd1):
    network = trained(sd1)
    groups, names = network.prepare_optimizer_params(0.0, 1e-3, 1e-3)
    network.prepare_grad_etc(sd1.text_encoder, sd1.unet)
    assert names == ["unet"]
    assert {id(p) for p in network.get_trainable_params()} == {id(p) for p in groups[0]["params"]}
    assert any(name.startswith("lora_te_") for name in network.state_dict())


def test_block_ranks(sd1):
    dims = ["0"] * 25
    dims[5], dims[12] = "3", "6"
    network = create_network(
        1.0, 4, 1.0, None, None, sd1.unet, block_dims=",".join(dims), block_alphas=",".join(["0.5"] * 25)
    )
    ranks = {
        (module.lora_name.split("_attentions")[0], module.rank, float(module.alpha)) for module in network.unet_loras
    }
    assert ranks == {("lora_unet_down_blocks_1", 3, 0.5), ("lora_unet_mid_block", 6, 0.5)}
    with pytest.raises(UserError, match="every rank is 0"):
        create_network(1.0, 4, 1.0, None, None, sd1.unet, block_dims=",".join(["0"] * 25))


def test_unknown_arguments_are_refused(sd1):
    with pytest.raises(UserError, match="no argument 'con_dim'"):
        create_network(1.0, 4, 1.0, None, None, sd1.unet, con_dim="4")


def losses_and_gradients(parts, *, checkpointing):
    network = trained(parts, conv_dim="2", module_dropout="0.2", rank_dropout="0.2")
    network.apply_to(parts.text_encoder, parts.unet)
    network.prepare_optimizer_params(1e-3, 1e-3, 1e-3)
    network.on_epoch_start(parts.text_encoder, parts.unet)
    if checkpointing:
        parts.unet.enable_gradient_checkpointing()
        use_text_checkpointing(parts.text_encoder)
    torch.manual_seed(3)
    noisy, ids = torch.randn(1, 4, 8, 8), torch.randint(0, 49000, (1, 77))
    context = parts.text_encoder(ids).last_hidden_state
    loss = parts.unet(noisy, torch.tensor([300]), context).sample.square().mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_repeats_the_dropouts():
    plain_loss, plain = losses_and_gradients(tiny_parts(), checkpointing=False)
    loss, gradients = losses_and_gradients(tiny_parts(), checkpointing=True)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert gradients.keys() == plain.keys()
    assert any(name.startswith("lora_te_") for name in plain)
    assert all(torch.allclose(gradients[name], plain[name], atol=1e-6) for name in plain)


def test_training_moves_the_network_and_nothing_else(sd1):
    network = create_network(1.0, 4, 1.0, None, sd1.text_encoder, sd1.unet)
    network.initialize(0)
    network.apply_to(sd1.text_encoder, sd1.unet)
    groups, _ = network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)
    base = {name: tensor.clone() for name, tensor in sd1.unet.state_dict().items()}
    optimizer = torch.optim.AdamW(groups)
    noisy, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    losses = []
    for _ in range(4):
        loss = sd1.unet(noisy, torch.tensor([300]), context).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, base[name]) for name, tensor in sd1.unet.state_dict().items())


def test_max_norm(sd1):
    network = trained(sd1, text=False)
    network.requires_grad_(False)
    norms = torch.tensor([module.change().norm() for module in network.unet_loras])
    limit = norms.median().item()
    directions = [module.change() / module.change().norm() for module in network.unet_loras]
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    after = torch.tensor([module.change().norm() for module in network.unet_loras])
    assert scaled == int((norms > limit * (1 + 1e-6)).sum())
    assert torch.allclose(after, norms.clamp(max=limit), rtol=1e-4)
    assert mean == pytest.approx(after.mean().item(), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)
    for module, direction in zip(network.unet_loras, directions, strict=True):
        assert torch.allclose(module.change() / module.change().norm(), direction, atol=1e-5)
    again, *_ = network.apply_max_norm_regularization(limit * 1.001, "cpu")
    assert again == 0


def test_max_norm_of_a_new_network(sd1):
    network = create_network(1.0, 4, 1.0, None, None, sd1.unet)
    assert network.apply_max_norm_regularization(1.0, None) == (0, 0.0, 0.0)
