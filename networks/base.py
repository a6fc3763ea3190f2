"""What every adapter network can do, and how one is hung into a model.

An adapter leaves the model's modules where they are: it replaces the ``forward`` of single layers on the instance and
keeps the layer's own. A model with an adapter attached must not be deep-copied, as the copy would still call the
original's layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ParameterGroup = dict[str, Any]
Layer = nn.Linear | nn.Conv2d


class AdapterNetwork(Protocol):
    """The contract between a training script and a network module, our own or a third party's.

    The object is an ``nn.Module`` whose state dict is the content of the network file.
    """

    def apply_to(
        self, text_encoder: nn.Module | None, unet: nn.Module, apply_text_encoder: bool, apply_unet: bool
    ) -> None:
        """Attach the modules of the chosen parts to the model and drop the others."""
        ...

    def prepare_optimizer_params(self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float) -> Any:
        """Parameter groups, or ``(groups, names)``; a group whose learning rate is 0 or None is left out."""
        ...

    def prepare_grad_etc(self, text_encoder: nn.Module | None, unet: nn.Module) -> None:
        """Make the network's parameters trainable."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Prepare for a model whose blocks are recomputed in the backward pass."""
        ...

    def on_epoch_start(self, text_encoder: nn.Module | None, unet: nn.Module) -> None:
        """Called before every epoch: switches to training mode."""
        ...

    def on_step_start(self) -> None:
        """Called before every step."""
        ...

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """The parameters whose gradients are clipped."""
        ...

    def save_weights(self, file: str, dtype: "torch.dtype | None", metadata: dict[str, str] | None) -> None:
        """Write the network file; the suffix chooses the format."""
        ...

    def load_weights(self, file: str) -> Any:
        """Read a network file and return a report that can be printed."""
        ...

    def is_mergeable(self) -> bool:
        """Whether :meth:`merge_to` can fold the network into the model's weights."""
        ...

    def merge_to(
        self,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        weights_sd: "Mapping[str, Tensor]",
        dtype: "torch.dtype | None",
        device: "torch.device | str | None",
    ) -> None:
        """Fold ``weights_sd`` into the model's weights."""
        ...

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength, 1 in training."""
        ...

    def apply_max_norm_regularization(
        self, max_norm_value: float, device: "torch.device | str | None"
    ) -> tuple[int, float, float]:
        """Scale down changes that are too large; returns ``(modules scaled, mean norm, largest norm)``."""
        ...

    def state_dict(self) -> "dict[str, Tensor]":
        """The content of the network file."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter."""
        ...


@runtime_checkable
class KeyedInitialization(Protocol):
    """A network whose start does not depend on the order in which its modules are made."""

    def initialize(self, seed: int) -> None:
        """Draw the initial weights of each module from the key ``(seed, "init", module name)``."""
        ...


class LayerModule(Protocol):
    """One ``nn.Module`` that changes one layer: what :class:`networks.network.LayerNetwork` is made of.

    Attributes:
        lora_name: Name in the network file, in front of the first dot.
        multiplier: Strength, 1 in training.
    """

    lora_name: str
    multiplier: float

    def initialize(self, seed: int) -> None:
        """Draw the initial weights from the key ``(seed, "init", lora_name)``."""
        ...

    def attach(self) -> None:
        """Make the layer compute with this module."""
        ...

    def detach(self) -> None:
        """Let the layer compute without this module again."""
        ...

    def trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: at the learning rate of the part, and at that times the ratio of LoRA+."""
        ...

    def is_in(self, weights: "Mapping[str, Tensor]") -> bool:
        """Whether a network file holds this module."""
        ...

    def merge(self, dtype: "torch.dtype | None", device: "torch.device | str | None") -> None:
        """Fold the change into the layer's weight, computed in float32 and rounded to ``dtype``."""
        ...

    def change_norm(self) -> "Tensor":
        """Frobenius norm of the change of the weight at strength 1, 0-d float32."""
        ...

    def scale_change(self, factor: "Tensor") -> None:
        """Multiply the change of the weight by ``factor`` (0-d)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter, trained or not."""
        ...


class NamedTextEncoder(nn.Module):
    """Gives the text encoder's modules the names that network files use.

    The modules of transformers' ``CLIPTextModel`` lie at its top level, while files call them
    ``lora_te_text_model_encoder_layers_...``.
    """

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


def named_text_encoder(text_encoder: nn.Module) -> nn.Module:
    """``text_encoder`` in a form whose module paths begin with ``text_model.``; itself where they already do."""
    if any(name == "text_model" for name, _ in text_encoder.named_children()):
        return text_encoder
    return NamedTextEncoder(text_encoder)


class Attachment:
    """Lets one adapter module stand in for one layer, and steps back again.

    It is no ``nn.Module``, so the layer does not become a child of the module that holds it.

    Attributes:
        layer: The layer that is changed.
    """

    def __init__(self, name: str, layer: "Layer") -> None:
        self.layer = layer
        self._name = name
        self._before: Callable[..., Any] | None = None

    def attach(self, forward: "Callable[..., Tensor]") -> None:
        """Make the layer call ``forward``."""
        assert self._before is None, f"{self._name} is attached already"
        self._before = self.layer.forward
        layer: nn.Module = self.layer
        layer.forward = forward

    def detach(self) -> None:
        """Let the layer compute as before; the last one attached to a layer goes first."""
        assert self._before is not None, f"{self._name} is not attached"
        layer: nn.Module = self.layer
        if getattr(self._before, "__func__", None) is type(layer).forward:
            del layer.forward
        else:
            layer.forward = self._before
        self._before = None

    def original(self, x: "Tensor") -> "Tensor":
        """What the layer computes without the module."""
        assert self._before is not None, f"{self._name} is not attached"
        output: Tensor = self._before(x)
        return output
