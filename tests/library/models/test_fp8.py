"""Frozen weights in 8 bits: the same as weights rounded once, through adapters, checkpoints and autocast."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.checkpointing import use_checkpointing
from library.models.fp8 import STORAGE, narrow_weights
from networks.base import named_text_encoder
from networks.lora import create_network
from tests.tiny import TinyParts, tiny_parts


@pytest.fixture(scope="module")
def parts() -> TinyParts:
    return tiny_parts("sd1", layers_per_block=1)


def rounded(module: nn.Module) -> nn.Module:
    """A copy whose matrices and convolutions were 8 bits once and are float32 again: computes by torch's own layers."""
    plain = copy.deepcopy(module)
    for layer in plain.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.data = layer.weight.data.to(STORAGE).float()
    return plain


def narrowed(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    narrow = copy.deepcopy(module)
    narrow_weights(narrow, dtype=dtype, part="U-Net")
    return narrow


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 64, generator=generator)
    return noisy, torch.tensor([3, 500]), text.requires_grad_()


def found(unet: nn.Module) -> tuple[Tensor, Tensor]:
    """Prediction, and the gradient that reaches the text."""
    noisy, timesteps, text = inputs()
    prediction = unet(noisy, timesteps, text).sample
    return prediction.detach(), torch.autograd.grad(prediction.float().square().sum(), text)[0]


def test_results_and_gradients_are_those_of_the_rounded_weights(parts: TinyParts) -> None:
    for ours, theirs in zip(found(narrowed(parts.unet)), found(rounded(parts.unet)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    # And not those of the model itself.
    assert float((found(narrowed(parts.unet))[0] - found(parts.unet)[0]).abs().max()) > 1e-4


def test_matrices_and_convolutions_are_8_bits_and_nothing_else(parts: TinyParts) -> None:
    for module in (parts.unet, parts.text_encoder):
        narrow = narrowed(module)
        names = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
        assert {name for name, value in narrow.named_parameters() if value.dtype == STORAGE} == names
        assert {value.dtype for name, value in narrow.named_parameters() if name not in names} == {torch.float32}
        assert narrow.state_dict().keys() == module.state_dict().keys()


def test_the_dtype_of_the_computation_is_kept_under_autocast(parts: TinyParts) -> None:
    narrow = narrowed(parts.unet, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = found(narrow), found(rounded(parts.unet))
    assert ours[0].dtype == theirs[0].dtype
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).abs().max()) < 0.05 * float(other.abs().max())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_the_gradients_of_the_rounded_model(parts: TinyParts, checkpointing: bool) -> None:
    gradients = []
    for make in (narrowed, rounded):
        unet, text_encoder = make(parts.unet), make(parts.text_encoder)
        named = named_text_encoder(text_encoder)
        network = create_network(1.0, 4, 2, None, named, unet, conv_dim="2")
        network.initialize(5)
        network.apply_to(named, unet, True, True)
        for module in network.parameters():
            module.data += 0.01
        if checkpointing:
            unet.train()
            use_checkpointing(unet, offload=False)
        noisy, timesteps, _ = inputs()
        text = text_encoder(torch.arange(2 * 77).view(2, 77)).last_hidden_state
        unet(noisy, timesteps, text).sample.square().sum().backward()
        gradients.append({name: value.grad for name, value in network.named_parameters() if value.requires_grad})
    ours, theirs = gradients
    assert len(ours) > 100
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-3)


def test_the_backward_pass_keeps_no_wide_copy() -> None:
    """What autograd holds of a layer between the passes is the narrow weight itself."""
    layer = nn.Sequential(nn.Linear(256, 256), nn.Conv2d(1, 1, 3)).requires_grad_(False)
    narrow_weights(layer, dtype=torch.float32, part="U-Net")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(1, 256, 256, requires_grad=True)[None]).sum()
    assert [tensor.dtype for tensor in kept if tensor.numel() > 9] == [STORAGE]


def test_memory_is_a_quarter(parts: TinyParts) -> None:
    def size(module: nn.Module) -> int:
        layers = [part.weight for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        return sum(weight.untyped_storage().nbytes() for weight in layers)

    narrow = narrowed(parts.unet)
    gc.collect()
    assert size(narrow) * 4 == size(parts.unet)


def test_a_weight_that_does_not_fit_is_refused() -> None:
    layer = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    layer[0].weight.data[0, 0] = 500
    with pytest.raises(UserError, match="448"):
        narrow_weights(layer, dtype=torch.float32, part="U-Net")
