"""What the parts of the tiny model start from: near the identity, or near a trained smaller model.

A network this small and this deep does not learn from the usual random start (the VAE's error stays where it is): its
residual branches must start quiet, and its plain convolutions must hand on what they receive.
"""

import re
from typing import Final

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

_UP_LAYER: Final = re.compile(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)")
_UP_PART: Final = re.compile(r"up_blocks\.(\d+)\.(.*)")
_VAE_PASSES: Final = ("encoder.conv_in", "decoder.conv_in", "post_quant_conv")


def pass_through(convolution: nn.Module) -> None:
    """Make a convolution hand its channels on, in turn, with a little of everything else.

    Channel i of the output shows channel i of the input (counted round when there are fewer): the pixel itself, or the
    mean of four where an unpadded kernel halves the picture.
    """
    weight: Tensor = convolution.weight
    outputs, inputs, height, _ = weight.shape
    weight.mul_(0.3)
    for channel in range(outputs):
        if convolution.stride[0] == 2 and convolution.padding[0] == 0:
            weight[channel, channel % inputs, :2, :2] += 0.25
        else:
            weight[channel, channel % inputs, height // 2, height // 2] += 1
    convolution.bias.zero_()


@torch.no_grad()
def calm_vae(vae: nn.Module) -> None:
    """Start a VAE near "keep the mean of 8x8 pixels", with a small variance."""
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            _quieten(module.conv2, 0.05)
            if module.conv_shortcut is not None:
                pass_through(module.conv_shortcut)
        elif name.endswith("to_out.0"):
            _quieten(module, 0.05)
        elif name.endswith("samplers.0.conv") or name in _VAE_PASSES:
            pass_through(module)
    latent_channels = vae.config.latent_channels
    vae.quant_conv.weight[latent_channels:].mul_(0.1)
    vae.quant_conv.bias[latent_channels:] = -4  # log variance


@torch.no_grad()
def calm_unet(unet: nn.Module) -> None:
    """Start a U-Net with quiet branches and a small answer."""
    for name, module in unet.named_modules():
        if name.endswith("conv2") or name == "conv_out":
            _quieten(module, 0.1)
        elif name.endswith(("to_out.0", "ff.net.2")):
            module.weight.mul_(0.3)


@torch.no_grad()
def grow_unet(unet: nn.Module, trained: nn.Module) -> set[str]:
    """Start ``unet`` from ``trained``, a U-Net of the same kind with fewer levels or fewer layers a block.

    Blocks are matched from the outside: the first down blocks and the last up blocks of both work at the same
    resolution. Within a block the first layers match and so do the last, because skip connections reach them in that
    order. What has no partner starts close to the identity, so the grown model begins near what the trained one does.

    Returns:
        The names of the parameters of ``unet`` that were copied.
    """
    target = dict(unet.named_parameters())
    copied = set()
    for name, tensor in trained.named_parameters():
        place = matching_name(
            name,
            layers=trained.config.layers_per_block,
            more_layers=unet.config.layers_per_block - trained.config.layers_per_block,
            more_blocks=len(unet.up_blocks) - len(trained.up_blocks),
        )
        if place in target and target[place].shape == tensor.shape:
            target[place].copy_(tensor)
            copied.add(place)
    for name, module in unet.named_modules():
        if f"{name}.weight" in copied:
            continue
        if name.endswith((".conv2", ".proj_out")):
            _quieten(module, 0.5)
        elif name.endswith(("conv_shortcut", "samplers.0.conv")):
            pass_through(module)
    return copied


def matching_name(name: str, *, layers: int, more_layers: int, more_blocks: int) -> str:
    """Where parameter ``name`` of a trained U-Net belongs in a larger one.

    Args:
        name: Parameter name in the trained U-Net.
        layers: Its layers a down block; an up block has one more.
        more_layers: How many more layers a block the larger one has.
        more_blocks: How many more down blocks, and up blocks, the larger one has.
    """
    layer = _UP_LAYER.fullmatch(name)
    if layer:
        position = int(layer[3])
        if position == layers:
            position += more_layers
        return f"up_blocks.{int(layer[1]) + more_blocks}.{layer[2]}.{position}.{layer[4]}"
    part = _UP_PART.fullmatch(name)
    if part:
        return f"up_blocks.{int(part[1]) + more_blocks}.{part[2]}"
    return name


def _quieten(module: nn.Module, scale: float) -> None:
    module.weight.mul_(scale)
    module.bias.zero_()
