"""Networks of the LoRA family, which differ in the variant of their modules: LoRA, LoRA-FA and DyLoRA.

Which layers get a module: in the U-Net the linear layers and 1x1 convolutions of the transformer blocks, with
``conv_dim`` also the layers of the residual, downsampling and upsampling blocks; in the text encoder the linear layers
of attention and MLP.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from library.errors import UserError
from library.files import read_tensors
from networks.adapter_files import ALPHA, lora_dims, require_lora
from networks.base import Layer, named_text_encoder
from networks.block_weights import block_index
from networks.lora_module import LoRAModule, Variant, is_pointwise
from networks.lora_settings import RANK_ARGUMENTS, LoRASettings, Rank, read_settings
from networks.lora_weights import conform
from networks.network import (
    CONVOLUTION_BLOCKS,
    TEXT_BLOCKS,
    TRANSFORMER_BLOCKS,
    GroupRates,
    LayerNetwork,
    layers_of,
    report_unmatched,
)

logger = logging.getLogger(__name__)

UNET_PREFIX: Final = "lora_unet"
TEXT_ENCODER_PREFIX: Final = "lora_te"

RankOf = Callable[[str, Layer], Rank | None]
LowRankNetwork = LayerNetwork[LoRAModule]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankFamily:
    """The two entries of a network module, for one member of the family.

    Attributes:
        module: Import path of the network module, a key of :data:`networks.lora_settings.ARGUMENTS_OF`.
        name: What messages call the network.
        variant: What its modules do, given the settings.
    """

    module: str
    name: str
    variant: Callable[[LoRASettings], Variant]

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: object,
    ) -> LowRankNetwork:
        """A new network for the model; nothing is attached yet.

        Args:
            multiplier: Strength, 1 for training.
            network_dim: Rank, 4 when None.
            network_alpha: Alpha; None and 0 mean the rank.
            vae: Not used; part of the contract.
            text_encoder: CLIP text model, or None for a network of the U-Net alone.
            unet: Diffusers U-Net.
            neuron_dropout: Dropout of the down output, in [0, 1).
            **kwargs: ``--network_args`` as text, see :func:`networks.lora_settings.read_settings`.

        Raises:
            UserError: An argument is unknown or not possible, or no module remains.
        """
        settings = read_settings(network_dim, network_alpha, neuron_dropout, kwargs, module=self.module)
        logger.info(
            "create %s network. base dim (rank): %d, alpha: %s", self.name, settings.base.dim, settings.base.alpha
        )
        network = self._network(
            text_encoder,
            unet,
            settings,
            text_rank=lambda _name, _layer: settings.base,
            unet_rank=lambda name, layer: _unet_rank(settings, name, layer),
            multiplier=multiplier,
            unet_blocks=TRANSFORMER_BLOCKS + (CONVOLUTION_BLOCKS if settings.targets_convolutions else ()),
        )
        if not network.modules_by_name():
            raise UserError(
                "the network has no modules: every rank is 0", where="--network_args", remedy="Raise a rank."
            )
        return network

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str,
        vae: nn.Module | None,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: object,
    ) -> tuple[LowRankNetwork, Mapping[str, Tensor]]:
        """A network with the modules, ranks and alphas of a file, and the file's tensors (which are not loaded yet).

        Args:
            multiplier: Strength.
            file: Path of the network file.
            vae: Not used; part of the contract.
            text_encoder: CLIP text model, or None.
            unet: Diffusers U-Net.
            weights_sd: The file's tensors, where they have been read.
            for_inference: Leave the network in evaluation mode, without gradients.
            **kwargs: ``--network_args`` as text; those about ranks are not used.

        Raises:
            UserError: The file holds no LoRA, or none of its modules fits the model.
        """
        weights = read_tensors(Path(file)).tensors if weights_sd is None else weights_sd
        require_lora(weights, where=file)
        overruled = sorted(kwargs.keys() & set(RANK_ARGUMENTS))
        if overruled:
            logger.warning("ranks and alphas come from %s: %s not used", Path(file).name, ", ".join(overruled))
        ranks = _ranks_in(weights)
        settings = read_settings(
            None,
            None,
            None,
            {name: value for name, value in kwargs.items() if name not in overruled},
            module=self.module,
            ranks={rank.dim for rank in ranks.values()},
        )
        network = self._network(
            text_encoder,
            unet,
            settings,
            text_rank=lambda name, _layer: ranks.get(name),
            unet_rank=lambda name, _layer: ranks.get(name),
            multiplier=multiplier,
            unet_blocks=TRANSFORMER_BLOCKS + CONVOLUTION_BLOCKS,
        )
        report_unmatched(ranks, network, file)
        if for_inference:
            network.requires_grad_(False).eval()
        return network, weights

    def _network(
        self,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        settings: LoRASettings,
        *,
        text_rank: RankOf,
        unet_rank: RankOf,
        multiplier: float,
        unet_blocks: tuple[type[nn.Module], ...],
    ) -> LowRankNetwork:
        """A network with a module for each layer that ``text_rank`` or ``unet_rank`` gives a rank above 0."""
        variant = self.variant(settings)

        def modules(layers: Mapping[str, Layer], rank_of: RankOf) -> list[LoRAModule]:
            ranks = ((name, layer, rank_of(name, layer)) for name, layer in layers.items())
            return [
                LoRAModule(name, layer, rank, multiplier=multiplier, dropouts=settings.dropouts, variant=variant)
                for name, layer, rank in ranks
                if rank and rank.dim
            ]

        text = layers_of(named_text_encoder(text_encoder), TEXT_ENCODER_PREFIX, TEXT_BLOCKS) if text_encoder else {}
        return LayerNetwork(
            modules(text, text_rank),
            modules(layers_of(unet, UNET_PREFIX, unet_blocks), unet_rank),
            name=self.name,
            conform=conform,
            rates=GroupRates(
                block_lr=settings.block_lr,
                loraplus_unet=settings.loraplus_unet,
                loraplus_text_encoder=settings.loraplus_text_encoder,
            ),
        )


def _ranks_in(weights: Mapping[str, Tensor]) -> dict[str, Rank]:
    dims = lora_dims({name: tuple(tensor.shape) for name, tensor in weights.items()})
    return {name: Rank(dim, float(weights.get(name + ALPHA, dim))) for name, dim in dims.items()}


def _unet_rank(settings: LoRASettings, name: str, layer: Layer) -> Rank | None:
    if is_pointwise(layer):
        return settings.blocks[block_index(name)] if settings.blocks else settings.base
    return settings.conv_blocks[block_index(name)] if settings.conv_blocks else settings.conv
