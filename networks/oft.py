"""OFT: the outputs of the U-Net's layers are rotated (``--network_module networks.oft``).

A rotation keeps the angles between the neurons of a layer, and so more of what the model knows. Which layers: the
linear ones of attention; with ``enable_all_linear`` all linear layers and 1x1 convolutions of the transformer blocks,
with ``enable_conv`` also the layers of the residual, downsampling and upsampling blocks. The text encoder stays as it
is. Qiu et al. 2023, https://arxiv.org/abs/2306.07280.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.files import read_tensors
from networks.adapter_files import ALPHA, OFT_BLOCKS, OFT_PREFIX, oft_blocks, require_oft
from networks.base import Layer
from networks.network import (
    ATTENTION,
    CONVOLUTION_BLOCKS,
    TRANSFORMER_BLOCKS,
    GroupRates,
    LayerNetwork,
    layers_of,
    report_unmatched,
)
from networks.oft_module import OFTModule
from networks.oft_settings import DEFAULT_CONSTRAINT, TARGETS, OFTSettings, read_oft_settings

logger = logging.getLogger(__name__)

OFTNetwork = LayerNetwork[OFTModule]


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> OFTNetwork:
    """A new network for the U-Net; nothing is attached yet.

    Args:
        multiplier: Strength, 1 for training.
        network_dim: Number of blocks, 4 when None; it divides the outputs of every layer.
        network_alpha: The constraint, 0.001 when None.
        vae: Not used; part of the contract.
        text_encoder: Not used: the network is for the U-Net.
        unet: Diffusers U-Net.
        neuron_dropout: None or 0: there is no dropout.
        **kwargs: ``--network_args`` as text, see :func:`networks.oft_settings.read_oft_settings`.

    Raises:
        UserError: An argument is unknown or not possible, or a layer cannot be divided into the blocks.
    """
    settings = read_oft_settings(network_dim, network_alpha, neuron_dropout, kwargs)
    layers = _targets(unet, settings)
    _check_divisible(layers, settings.blocks)
    logger.info("create OFT network. blocks: %d, constraint: %s", settings.blocks, settings.constraint)
    return _network(
        [
            OFTModule(name, layer, blocks=settings.blocks, constraint=settings.constraint, multiplier=multiplier)
            for name, layer in layers.items()
        ]
    )


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: nn.Module | None,
    text_encoder: nn.Module | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: object,
) -> tuple[OFTNetwork, Mapping[str, Tensor]]:
    """A network with the modules, blocks and constraints of a file, and the file's tensors (not loaded yet).

    Args:
        multiplier: Strength.
        file: Path of the network file.
        vae: Not used; part of the contract.
        text_encoder: Not used.
        unet: Diffusers U-Net.
        weights_sd: The file's tensors, where they have been read.
        for_inference: Leave the network in evaluation mode, without gradients.
        **kwargs: ``--network_args`` as text; those that choose layers are not used.

    Raises:
        UserError: The file holds no OFT, or none of its modules fits the model.
    """
    weights = read_tensors(Path(file)).tensors if weights_sd is None else weights_sd
    require_oft(weights, where=file)
    overruled = sorted(kwargs.keys() & set(TARGETS))
    if overruled:
        logger.warning("the layers come from %s: %s not used", Path(file).name, ", ".join(overruled))
    read_oft_settings(None, None, None, {name: value for name, value in kwargs.items() if name not in overruled})
    blocks = oft_blocks({name: tuple(tensor.shape) for name, tensor in weights.items()})
    layers = layers_of(unet, OFT_PREFIX, TRANSFORMER_BLOCKS + CONVOLUTION_BLOCKS)
    modules = []
    for name, layer in layers.items():
        if name not in blocks:
            continue
        _check_divisible({name: layer}, blocks[name])
        constraint = float(weights.get(name + ALPHA, DEFAULT_CONSTRAINT))
        modules.append(OFTModule(name, layer, blocks=blocks[name], constraint=constraint, multiplier=multiplier))
    network = _network(modules)
    report_unmatched(blocks, network, file)
    if for_inference:
        network.requires_grad_(False).eval()
    return network, weights


def _network(modules: list[OFTModule]) -> OFTNetwork:
    return LayerNetwork([], modules, name="OFT", conform=_conform, rates=GroupRates())


def _targets(unet: nn.Module, settings: OFTSettings) -> dict[str, Layer]:
    linear = layers_of(unet, OFT_PREFIX, TRANSFORMER_BLOCKS if settings.all_linear else ATTENTION)
    return linear | (layers_of(unet, OFT_PREFIX, CONVOLUTION_BLOCKS) if settings.conv else {})


def _check_divisible(layers: Mapping[str, Layer], blocks: int) -> None:
    outputs = {name: layer.weight.shape[0] for name, layer in layers.items()}
    odd = [name for name, count in outputs.items() if count % blocks]
    if odd:
        common = math.gcd(*outputs.values())
        possible = [str(number) for number in range(1, min(common, 64) + 1) if common % number == 0]
        raise UserError(
            f"the {outputs[odd[0]]} outputs of {odd[0]} cannot be divided into {blocks} blocks"
            + (f"; {len(odd) - 1} more layers neither" if len(odd) > 1 else ""),
            where="--network_dim",
            remedy=f"It is the number of blocks here; this model can have {', '.join(possible)}.",
        )


def _conform(weights: Mapping[str, Tensor], modules: Mapping[str, OFTModule], *, where: str) -> dict[str, Tensor]:
    """``weights`` with the alphas a file may leave out.

    Raises:
        UserError: The file is no OFT, or the blocks of a module differ in number or size.
    """
    require_oft(weights, where=where)
    found = dict(weights)
    for name, module in modules.items():
        blocks = weights.get(name + OFT_BLOCKS)
        if blocks is None:
            continue
        if blocks.shape != module.oft_blocks.shape:
            raise UserError(
                f"{name} has blocks of the shape {tuple(blocks.shape)} in the file and "
                f"{tuple(module.oft_blocks.shape)} here",
                where=where,
                remedy=f"Set --network_dim {blocks.shape[0]}, or add --dim_from_weights; where the outputs differ, "
                "too, the file was made for a model of another width.",
            )
        found.setdefault(name + ALPHA, torch.tensor(DEFAULT_CONSTRAINT))
    return found
