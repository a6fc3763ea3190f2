"""A network made of one module for each adapted layer: the contract of our own adapters, whatever the modules do.

Which layers there are: in the U-Net those of the transformer blocks or of attention alone, and those of the residual,
downsampling and upsampling blocks; in the text encoder the linear layers of attention and MLP.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from library.errors import UserError
from library.files import read_tensors
from networks.adapter_files import write_network
from networks.base import Layer, LayerModule, ParameterGroup
from networks.block_weights import block_index

logger = logging.getLogger(__name__)

TEXT_BLOCKS: Final = (CLIPAttention, CLIPMLP)
ATTENTION: Final = (Attention,)
TRANSFORMER_BLOCKS: Final = (Transformer2DModel,)
CONVOLUTION_BLOCKS: Final = (ResnetBlock2D, Downsample2D, Upsample2D)

Module = TypeVar("Module", bound=LayerModule)
Conform = Callable[..., dict[str, Tensor]]
"""``(weights, modules by name, where=file)`` to the weights in the modules' shapes; refuses what does not fit."""


def layers_of(model: nn.Module, prefix: str, blocks: tuple[type[nn.Module], ...]) -> dict[str, Layer]:
    """Linear and convolution layers inside ``blocks`` of ``model`` by adapter name, in the model's order."""
    found: dict[str, Layer] = {}
    for path, block in model.named_modules():
        if not isinstance(block, blocks):
            continue
        for inner, layer in block.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found[".".join(filter(None, (prefix, path, inner))).replace(".", "_")] = layer
    return found


def report_unmatched(in_file: Iterable[str], network: "LayerNetwork[Any]", file: str) -> None:
    """Say which of the modules ``in_file`` have no layer in the model.

    Raises:
        UserError: None of them has one.
    """
    in_file = set(in_file)
    unmatched = sorted(in_file - network.modules_by_name().keys())
    if len(unmatched) == len(in_file):
        raise UserError(
            f"none of the {len(in_file)} modules of the file fits this model"
            + (f", for instance {unmatched[0]}" if unmatched else ""),
            where=file,
            remedy="Give a network file made for Stable Diffusion of the same structure.",
        )
    if unmatched:
        logger.warning(
            "%d of %d modules in %s have no layer in this model and are left out, for instance %s",
            len(unmatched),
            len(in_file),
            Path(file).name,
            unmatched[0],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRates:
    """How the learning rates of a part are divided.

    Attributes:
        block_lr: Weight of each of the 25 U-Net blocks, or None for one group.
        loraplus_unet: LoRA+ ratio of the U-Net, or None.
        loraplus_text_encoder: LoRA+ ratio of the text encoder, or None.
    """

    block_lr: tuple[float, ...] | None = None
    loraplus_unet: float | None = None
    loraplus_text_encoder: float | None = None


class LayerNetwork(nn.Module, Generic[Module]):
    """The modules of a model's layers; its state dict is the content of the network file.

    Attributes:
        text_encoder_loras: Modules of the text encoder.
        unet_loras: Modules of the U-Net.
    """

    def __init__(
        self,
        text_encoder_loras: Sequence[Module],
        unet_loras: Sequence[Module],
        *,
        name: str,
        conform: Conform,
        rates: GroupRates,
    ) -> None:
        super().__init__()
        self.text_encoder_loras = list(text_encoder_loras)
        self.unet_loras = list(unet_loras)
        self._name = name
        self._conform = conform
        self._rates = rates
        for module in (*self.text_encoder_loras, *self.unet_loras):
            self.add_module(module.lora_name, cast(nn.Module, module))
        logger.info("create %s for Text Encoder: %d modules.", name, len(self.text_encoder_loras))
        logger.info("create %s for U-Net: %d modules.", name, len(self.unet_loras))

    def modules_by_name(self) -> dict[str, Module]:
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
            "enable %s: %d modules in the text encoder, %d in the U-Net",
            self._name,
            len(self.text_encoder_loras),
            len(self.unet_loras),
        )

    def _drop(self, modules: list[Module]) -> None:
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
        self.requires_grad_(False)

        def add(name: str, modules: Iterable[Module], lr: float | None, ratio: float | None) -> None:
            lr = default_lr if lr is None else lr
            halves: dict[str, list[nn.Parameter]] = {"": [], " plus": []}
            for module in modules:
                plain, plus = module.trained_parameters()
                halves[""] += plain
                halves[" plus" if ratio else ""] += plus
            for suffix, parameters in halves.items():
                if lr and lr > 0 and parameters:
                    groups.append({"params": parameters, "lr": lr * ratio if ratio and suffix else lr})
                    names.append(name + suffix)

        rates = self._rates
        add("textencoder", self.text_encoder_loras, text_encoder_lr, rates.loraplus_text_encoder)
        unet_lr = default_lr if unet_lr is None else unet_lr
        if rates.block_lr is None:
            add("unet", self.unet_loras, unet_lr, rates.loraplus_unet)
        else:
            for block, modules in sorted(self._unet_blocks().items()):
                add(f"unet_block{block}", modules, (unet_lr or 0.0) * rates.block_lr[block], rates.loraplus_unet)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return groups, names

    def _unet_blocks(self) -> dict[int, list[Module]]:
        blocks: dict[int, list[Module]] = {}
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
        write_network(Path(file), self.state_dict(), metadata, dtype)

    def load_weights(self, file: str) -> Any:
        """Read a network file into the modules and return torch's report (``<All keys matched successfully>``).

        Raises:
            UserError: The file is of another kind, or its sizes are not those of this network.
        """
        weights = read_tensors(Path(file)).tensors
        return self.load_state_dict(self._conform(weights, self.modules_by_name(), where=file), strict=False)

    def is_mergeable(self) -> bool:
        """The modules can be merged."""
        return True

    def merge_to(
        self,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Load ``weights_sd`` and fold the modules it holds into the weights of their layers, in float32.

        Args:
            text_encoder: Not used: the modules know their layers.
            unet: Not used.
            weights_sd: Tensors of a network file.
            dtype: Round the result to this dtype (it keeps the layer's own dtype); no rounding when None.
            device: Where to compute; where the layer is when None.
        """
        modules = self.modules_by_name()
        self.load_state_dict(self._conform(weights_sd, modules, where="the network to merge"), strict=False)
        for module in modules.values():
            if module.is_in(weights_sd):
                module.merge(dtype, device)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Scale the change of a module down where its norm exceeds ``max_norm_value``.

        Returns:
            How many modules were scaled, and mean and largest norm afterwards.
        """
        modules = list(self.modules_by_name().values())
        norms = torch.stack([module.change_norm() for module in modules])
        ratios = (max_norm_value / norms).clamp(max=1.0)
        for module, ratio in zip(modules, ratios.unbind(), strict=True):
            module.scale_change(ratio)
        scaled = norms * ratios
        # One transfer from the device for all three.
        count, mean, largest = torch.stack([(ratios < 1).sum(), scaled.mean(), scaled.max()]).tolist()
        return int(count), mean, largest
