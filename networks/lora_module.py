"""One low-rank change of a linear layer or a convolution (LoRA, https://arxiv.org/abs/2106.09685; LoCon for 3x3)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from library.randomness import python_random, torch_generator
from networks.adapter_files import DOWN
from networks.base import Attachment, Layer
from networks.lora_settings import Dropouts, Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a member of the LoRA family does in its own way.

    Attributes:
        draw_down: Fills the down weights (r, in) or (r, in, k, k) of a new module, from the generator or, with None,
            from the global one.
        trains_down: Whether the down weights are trained, or stay as they were drawn.
        unit: Ranks are trained in blocks of this many, a drawn block at a time; None trains all of them.
    """

    draw_down: Callable[[Tensor, torch.Generator | None], object]
    trains_down: bool = True
    unit: int | None = None


def draw_uniform(down: Tensor, generator: torch.Generator | None) -> None:
    """Fill ``down`` from U(-1/sqrt(n), 1/sqrt(n)), n inputs of one output value (He et al. with a = sqrt 5)."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)


PLAIN = Variant(draw_down=draw_uniform)


def is_pointwise(layer: Layer) -> bool:
    """Whether ``layer`` is linear or a 1x1 convolution."""
    return isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)


class LoRAModule(nn.Module):
    """``W' = W + multiplier * (alpha / rank) * up @ down`` for one layer, without touching ``W``.

    Shapes: linear down (r, in), up (out, r); convolution down (r, in, k, k) with the layer's stride and padding, up
    (out, r, 1, 1). The up weights start at 0, so a new module changes nothing.
    """

    alpha: Tensor

    def __init__(
        self,
        lora_name: str,
        layer: Layer,
        rank: Rank,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
        variant: Variant = PLAIN,
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.rank = rank.dim
        self.multiplier = multiplier
        self.dropouts = dropouts or Dropouts()
        self.variant = variant
        self.lora_down, self.lora_up = _factors(layer, rank.dim)
        variant.draw_down(self.lora_down.weight, None)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(rank.alpha)))
        # A plain number beside the buffer: reading a tensor in forward would wait for the GPU.
        self._scale = rank.alpha / rank.dim
        self.register_load_state_dict_post_hook(_read_scale)  # type: ignore[no-untyped-call]
        self._attachment = Attachment(lora_name, layer)

    @property
    def layer(self) -> Layer:
        """The layer that is changed."""
        return self._attachment.layer

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self._scale

    def initialize(self, seed: int) -> None:
        """Draw down as the variant asks, with the key ``(seed, "init", lora_name)``; up is 0."""
        drawn = torch.empty(self.lora_down.weight.shape)
        self.variant.draw_down(drawn, torch_generator(seed, "init", self.lora_name))
        with torch.no_grad():
            self.lora_down.weight.copy_(drawn)
            self.lora_up.weight.zero_()

    def attach(self) -> None:
        """Make the layer compute with this module."""
        self._attachment.attach(self.forward)

    def detach(self) -> None:
        """Let the layer compute without this module again; the last one attached to a layer goes first."""
        self._attachment.detach()

    def trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Down (where the variant trains it), and up, which LoRA+ trains at a rate of its own."""
        return list(self.lora_down.parameters()) if self.variant.trains_down else [], list(self.lora_up.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """The changed layer's output for ``x``: (..., in) for linear, (B, in, H, W) for a convolution."""
        original = self._attachment.original(x)
        drops = self.training
        if drops and self.dropouts.module and float(torch.rand(())) < self.dropouts.module:
            return original
        if drops and self.variant.unit:
            return original + self._block_change(x, self._draw_block(self.variant.unit))
        down: Tensor = self.lora_down(x)
        if drops:
            down = self._drop(down)
        # The factor is applied to the r channels of down: cheaper than to the output, and the same.
        change: Tensor = self.lora_up(down * (self.multiplier * self._scale))
        return original + change

    def _draw_block(self, unit: int) -> slice:
        """The ranks that are trained now: the same for all calls within a micro-batch, so also when it is recomputed.

        The loop seeds torch's global generator by the address of every micro-batch; that seed is read and not drawn
        from, so neither the order of the layers nor other draws matter.
        """
        blocks = self.rank // unit
        first = unit * python_random(torch.initial_seed(), "rank block", self.lora_name).randrange(blocks)
        return slice(first, first + unit)

    def _block_change(self, x: Tensor, block: slice) -> Tensor:
        """The change by the ranks up to the end of ``block``, of which only those in ``block`` get gradients."""
        down, up = self.lora_down.weight, self.lora_up.weight
        down = torch.cat([down[: block.start].detach(), down[block]])
        up = torch.cat([up[:, : block.start].detach(), up[:, block]], dim=1)
        hidden: Tensor = functional_call(self.lora_down, {"weight": down}, (x,))
        # So many of the ranks make a smaller sum: its spread is brought to that of all of them.
        factor = self.multiplier * self._scale * math.sqrt(self.rank / block.stop)
        change: Tensor = functional_call(self.lora_up, {"weight": up}, (self._drop(hidden) * factor,))
        return change

    def _drop(self, down: Tensor) -> Tensor:
        if self.dropouts.neuron:
            down = nn.functional.dropout(down, self.dropouts.neuron)
        if self.dropouts.rank:
            keep = 1.0 - self.dropouts.rank
            axis = -1 if isinstance(self.layer, nn.Linear) else 1
            ranks = down.shape[axis]
            kept = torch.rand(down.shape[0], ranks, device=down.device) < keep
            inner = [1] * (down.ndim - 2)
            shape = [-1, *inner, ranks] if axis == -1 else [-1, ranks, *inner]
            down = down * (kept.to(down.dtype) / keep).view(shape)
        return down

    def is_in(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether a network file holds this module."""
        return self.lora_name + DOWN in weights

    def change(self) -> Tensor:
        """``(alpha / rank) * up @ down`` in float32, in the shape of the layer's weight; without the multiplier."""
        up, down = self.lora_up.weight.float(), self.lora_down.weight.float()
        return (up.flatten(1) @ down.flatten(1)).reshape(self.layer.weight.shape) * self._scale

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Add the change to the layer's weight, computed in float32 and rounded to ``dtype``."""
        weight = self.layer.weight
        self.to(device or weight.device)
        merged = weight.to(self.lora_up.weight.device, torch.float32) + self.change() * self.multiplier
        weight.copy_(merged.to(dtype or torch.float32))

    def change_norm(self) -> Tensor:
        """Frobenius norm of :meth:`change` (0-d float32), by ``|UD|^2 = tr(U^T U D D^T)``, so without building it."""
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * self._scale

    @torch.no_grad()
    def scale_change(self, factor: Tensor) -> None:
        """Multiply the change by ``factor`` (0-d): half of it, so to say, on either side where both are trained."""
        if not self.variant.trains_down:
            self.lora_up.weight.mul_(factor)
            return
        self.lora_up.weight.mul_(factor.sqrt())
        self.lora_down.weight.mul_(factor.sqrt())


def _factors(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    assert layer.groups == 1, "Stable Diffusion has no grouped convolutions"
    down = nn.Conv2d(
        layer.in_channels,
        rank,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        padding_mode=layer.padding_mode,
        bias=False,
    )
    return down, nn.Conv2d(rank, layer.out_channels, 1, bias=False)


def _read_scale(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, LoRAModule)
    module._scale = float(module.alpha) / module.rank
