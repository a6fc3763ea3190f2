"""LoRA for Stable Diffusion's U-Net and text encoder (``--network_module networks.lora``).

Which layers get a module: in the U-Net the linear layers and 1x1 convolutions of the transformer blocks, with
``conv_dim`` also the layers of the residual, downsampling and upsampling blocks; in the text encoder the linear layers
of attention and MLP. Hu et al. 2021, https://arxiv.org/abs/2106.09685; LoRA+: https://arxiv.org/abs/2402.12354.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from library.errors import UserError
from library.files import read_tensors, tensor_hashes, write_tensors
from networks.adapter_files import ALPHA, lora_dims, require_lora
from networks.base import ParameterGroup, named_text_encoder
from networks.block_weights import block_index
from networks.lora_module import Layer, LoRAModule, is_pointwise
from networks.lora_settings import RANK_ARGUMENTS, LoRASettings, Rank, read_settings
from networks.lora_weights import conform

logger = logging.getLogger(__name__)

UNET_PREFIX: Final = "lora_unet"
TEXT_ENCODER_PREFIX: Final = "lora_te"

_TEXT_BLOCKS: Final = (CLIPAttention, CLIPMLP)
_ATTENTION_BLOCKS: Final = (Transformer2DModel,)
_CONVOLUTION_BLOCKS: Final = (ResnetBlock2D, Downsample2D, Upsample2D)

RankOf = Callable[[str, Layer], Rank | None]


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> "LoRANetwork":
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
    settings = read_settings(network_dim, network_alpha, neuron_dropout, kwargs)
    network = LoRANetwork.create(
        text_encoder,
        unet,
        settings,
        text_rank=lambda _name, _layer: settings.base,
        unet_rank=lambda name, layer: _unet_rank(settings, name, layer),
        multiplier=multiplier,
        unet_blocks=_ATTENTION_BLOCKS + (_CONVOLUTION_BLOCKS if settings.targets_convolutions else ()),
    )
    if not network.modules_by_name():
        raise UserError("the network has no modules: every rank is 0", where="--network_args", remedy="Raise a rank.")
    logger.info("create LoRA network. base dim (rank): %d, alpha: %s", settings.base.dim, settings.base.alpha)
    _log_size(network)
    return network


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: nn.Module | None,
    text_encoder: nn.Module | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: object,
) -> "tuple[LoRANetwork, Mapping[str, Tensor]]":
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
    settings = read_settings(None, None, None, {name: value for name, value in kwargs.items() if name not in overruled})
    ranks = _ranks_in(weights)
    network = LoRANetwork.create(
        text_encoder,
        unet,
        settings,
        text_rank=lambda name, _layer: ranks.get(name),
        unet_rank=lambda name, _layer: ranks.get(name),
        multiplier=multiplier,
        unet_blocks=_ATTENTION_BLOCKS + _CONVOLUTION_BLOCKS,
    )
    _report_unmatched(network, ranks, file)
    _log_size(network)
    if for_inference:
        network.requires_grad_(False).eval()
    return network, weights


def _ranks_in(weights: Mapping[str, Tensor]) -> dict[str, Rank]:
    dims = lora_dims({name: tuple(tensor.shape) for name, tensor in weights.items()})
    return {name: Rank(dim, float(weights.get(name + ALPHA, dim))) for name, dim in dims.items()}


def _report_unmatched(network: "LoRANetwork", ranks: Mapping[str, Rank], file: str) -> None:
    unmatched = sorted(ranks.keys() - network.modules_by_name().keys())
    if len(unmatched) == len(ranks):
        raise UserError(
            f"none of the {len(ranks)} modules of the file fits this model, for instance {unmatched[0]}",
            where=file,
            remedy="Give a network file made for Stable Diffusion of the same structure.",
        )
    if unmatched:
        logger.warning(
            "%d of %d modules in %s have no layer in this model and are left out, for instance %s",
            len(unmatched),
            len(ranks),
            Path(file).name,
            unmatched[0],
        )


def _unet_rank(settings: LoRASettings, name: str, layer: Layer) -> Rank | None:
    if is_pointwise(layer):
        return settings.blocks[block_index(name)] if settings.blocks else settings.base
    return settings.conv_blocks[block_index(name)] if settings.conv_blocks else settings.conv


def _log_size(network: "LoRANetwork") -> None:
    logger.info("create LoRA for Text Encoder: %d modules.", len(network.text_encoder_loras))
    logger.info("create LoRA for U-Net: %d modules.", len(network.unet_loras))


def _layers(model: nn.Module, prefix: str, blocks: tuple[type[nn.Module], ...]) -> dict[str, Layer]:
    """Linear and convolution layers inside ``blocks`` of ``model`` by adapter name, in the model's order."""
    found: dict[str, Layer] = {}
    for path, block in model.named_modules():
        if not isinstance(block, blocks):
            continue
        for inner, layer in block.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found[".".join(filter(None, (prefix, path, inner))).replace(".", "_")] = layer
    return found


class LoRANetwork(nn.Module):
    """The LoRA modules of a model; its state dict is the content of the network file.

    Attributes:
        text_encoder_loras: Modules of the text encoder.
        unet_loras: Modules of the U-Net.
    """

    def __init__(
        self, text_encoder_loras: Sequence[LoRAModule], unet_loras: Sequence[LoRAModule], settings: LoRASettings
    ) -> None:
        super().__init__()
        self.text_encoder_loras = list(text_encoder_loras)
        self.unet_loras = list(unet_loras)
        self._settings = settings
        for module in (*self.text_encoder_loras, *self.unet_loras):
            self.add_module(module.lora_name, module)

    @classmethod
    def create(
        cls,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        settings: LoRASettings,
        *,
        text_rank: RankOf,
        unet_rank: RankOf,
        multiplier: float,
        unet_blocks: tuple[type[nn.Module], ...],
    ) -> "LoRANetwork":
        """A network with a module for each layer that ``text_rank`` or ``unet_rank`` gives a rank above 0."""

        def modules(layers: Mapping[str, Layer], rank_of: RankOf) -> list[LoRAModule]:
            ranks = ((name, layer, rank_of(name, layer)) for name, layer in layers.items())
            return [
                LoRAModule(name, layer, rank, multiplier=multiplier, dropouts=settings.dropouts)
                for name, layer, rank in ranks
                if rank and rank.dim
            ]

        text = _layers(named_text_encoder(text_encoder), TEXT_ENCODER_PREFIX, _TEXT_BLOCKS) if text_encoder else {}
        return cls(modules(text, text_rank), modules(_layers(unet, UNET_PREFIX, unet_blocks), unet_rank), settings)

    def modules_by_name(self) -> dict[str, LoRAModule]:
        """All modules, those of the text encoder first."""
        return {module.lora_name: module for module in (*self.text_encoder_loras, *self.unet_loras)}

    def initialize(self, seed: int) -> None:
        """Draw each module's weights from its own key, so neither order nor presence of others matters."""
        for module in self.modules_by_name().values():
            module.initialize(seed)

    def apply_to(
        self,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attach the modules of the chosen parts to the layers they were made for, and drop the others.

        Raises:
            UserError: No module remains.
        """
        if not apply_text_encoder:
            self._drop(self.text_encoder_loras)
        if not apply_unet:
            self._drop(self.unet_loras)
        if not self.modules_by_name():
            raise UserError(
                "the network has no modules for the parts that are trained",
                where="--network_train_unet_only, --network_train_text_encoder_only, --network_args",
                remedy="Train another part, or give it a rank above 0.",
            )
        for module in self.modules_by_name().values():
            module.attach()
        logger.info(
            "enable LoRA: %d modules in the text encoder, %d in the U-Net",
            len(self.text_encoder_loras),
            len(self.unet_loras),
        )

    def _drop(self, modules: list[LoRAModule]) -> None:
        for module in modules:
            delattr(self, module.lora_name)
        modules.clear()

    def detach(self) -> None:
        """Take an attached network out of the model again."""
        for module in self.modules_by_name().values():
            module.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of every module."""
        for module in self.modules_by_name().values():
            module.multiplier = multiplier

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[ParameterGroup], list[str]]:
        """Parameter groups and their names: textencoder, unet or unet_block<N>, each with "... plus" under LoRA+.

        A learning rate of None stands for ``default_lr``. Modules whose learning rate is 0 are frozen and in no group.
        """
        groups: list[ParameterGroup] = []
        names: list[str] = []

        def add(name: str, modules: Iterable[LoRAModule], lr: float | None, ratio: float | None) -> None:
            lr = default_lr if lr is None else lr
            is_trained = lr is not None and lr > 0
            halves: dict[str, list[Tensor]] = {"": [], " plus": []}
            for module in modules:
                module.requires_grad_(is_trained)
                halves[""].append(module.lora_down.weight)
                halves[" plus" if ratio else ""].append(module.lora_up.weight)
            for suffix, parameters in halves.items():
                if lr and is_trained and parameters:
                    groups.append({"params": parameters, "lr": lr * ratio if ratio and suffix else lr})
                    names.append(name + suffix)

        settings = self._settings
        add("textencoder", self.text_encoder_loras, text_encoder_lr, settings.loraplus_text_encoder)
        unet_lr = default_lr if unet_lr is None else unet_lr
        if settings.block_lr is None:
            add("unet", self.unet_loras, unet_lr, settings.loraplus_unet)
            return groups, names
        for block, modules in sorted(self._unet_blocks().items()):
            add(f"unet_block{block}", modules, (unet_lr or 0.0) * settings.block_lr[block], settings.loraplus_unet)
        return groups, names

    def _unet_blocks(self) -> dict[int, list[LoRAModule]]:
        blocks: dict[int, list[LoRAModule]] = {}
        for module in self.unet_loras:
            blocks.setdefault(block_index(module.lora_name), []).append(module)
        return blocks

    def prepare_grad_etc(self, text_encoder: nn.Module | None, unet: nn.Module) -> None:
        """Nothing to do: :meth:`prepare_optimizer_params` has said which modules are trained."""

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the modules compute inside the model's own blocks."""

    def on_epoch_start(self, text_encoder: nn.Module | None, unet: nn.Module) -> None:
        """Switch to training mode."""
        self.train()

    def on_step_start(self) -> None:
        """Nothing to do."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network file, with hashes added to the metadata; the suffix chooses the format.

        Raises:
            UserError: A weight is not finite, or the folder cannot be written to.
        """
        tensors = {name: tensor.detach().to("cpu", dtype=dtype) for name, tensor in self.state_dict().items()}
        described = dict(metadata or {})
        described["sshs_model_hash"], described["sshs_legacy_hash"] = tensor_hashes(tensors, described)
        write_tensors(Path(file), tensors, metadata=described)

    def load_weights(self, file: str) -> Any:
        """Read a network file into the modules and return torch's report (``<All keys matched successfully>``).

        A missing alpha means the rank; 2-D and 4-D weights of 1x1 layers are both taken.

        Raises:
            UserError: The file is no LoRA, or its ranks or widths are not those of this network.
        """
        weights = read_tensors(Path(file)).tensors
        return self.load_state_dict(conform(weights, self.modules_by_name(), where=file), strict=False)

    def is_mergeable(self) -> bool:
        """LoRA can be merged."""
        return True

    def merge_to(
        self,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add ``multiplier * (alpha / rank) * up @ down`` of ``weights_sd`` to the model's weights, in float32.

        Args:
            text_encoder: Not used: the modules know their layers.
            unet: Not used.
            weights_sd: Tensors of a network file.
            dtype: Round the result to this dtype (it keeps the layer's own dtype); no rounding when None.
            device: Where to compute; where the layer is when None.
        """
        self.load_state_dict(conform(weights_sd, self.modules_by_name(), where="the network to merge"), strict=False)
        for name, module in self.modules_by_name().items():
            if name + ".lora_down.weight" not in weights_sd:
                continue
            weight = module.layer.weight
            module.to(device or weight.device)
            with torch.no_grad():
                merged = weight.to(module.lora_up.weight.device, torch.float32) + module.change() * module.multiplier
                weight.copy_(merged.to(dtype or torch.float32))

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Scale up and down alike where the norm of a module's change exceeds ``max_norm_value``.

        Returns:
            How many modules were scaled, and mean and largest norm afterwards.
        """
        modules = list(self.modules_by_name().values())
        norms = torch.stack([module.change_norm() for module in modules])
        ratios = (max_norm_value / norms).clamp(max=1.0)
        for module, factor in zip(modules, ratios.sqrt().unbind(), strict=True):
            module.lora_up.weight.mul_(factor)
            module.lora_down.weight.mul_(factor)
        scaled = norms * ratios
        # One transfer from the device for all three.
        count, mean, largest = torch.stack([(ratios < 1).sum(), scaled.mean(), scaled.max()]).tolist()
        return int(count), mean, largest
