"""One low-rank change of a linear layer or a convolution (LoRA, https://arxiv.org/abs/2106.09685; LoCon for 3x3)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from library.randomness import torch_generator
from networks.base import attach, detach
from networks.lora_settings import Dropouts, Rank

Layer = nn.Linear | nn.Conv2d


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
        self, lora_name: str, layer: Layer, rank: Rank, *, multiplier: float = 1.0, dropouts: Dropouts | None = None
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.rank = rank.dim
        self.multiplier = multiplier
        self.dropouts = dropouts or Dropouts()
        self.lora_down, self.lora_up = _factors(layer, rank.dim)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(rank.alpha)))
        # A plain number beside the buffer: reading a tensor in forward would wait for the GPU.
        self._scale = rank.alpha / rank.dim
        self.register_load_state_dict_post_hook(_read_scale)  # type: ignore[no-untyped-call]
        # Inside a tuple the layer does not become a child, so it stays out of the state dict.
        self._layer = (layer,)
        self._original_forward: Callable[..., Any] | None = None

    @property
    def layer(self) -> Layer:
        """The layer that is changed."""
        return self._layer[0]

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self._scale

    def initialize(self, seed: int) -> None:
        """Draw down from U(-1/sqrt(n), 1/sqrt(n)), n inputs, with the key ``(seed, "init", lora_name)``; up is 0."""
        generator = torch_generator(seed, "init", self.lora_name)
        drawn = torch.empty(self.lora_down.weight.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_down.weight.copy_(drawn)
            self.lora_up.weight.zero_()

    def attach(self) -> None:
        """Make the layer compute with this module."""
        assert self._original_forward is None, f"{self.lora_name} is attached already"
        self._original_forward = attach(self.layer, self.forward)

    def detach(self) -> None:
        """Let the layer compute without this module again; the last one attached to a layer goes first."""
        assert self._original_forward is not None, f"{self.lora_name} is not attached"
        detach(self.layer, self._original_forward)
        self._original_forward = None

    def forward(self, x: Tensor) -> Tensor:
        """The changed layer's output for ``x``: (..., in) for linear, (B, in, H, W) for a convolution."""
        assert self._original_forward is not None
        original: Tensor = self._original_forward(x)
        drops = self.training
        if drops and self.dropouts.module and float(torch.rand(())) < self.dropouts.module:
            return original
        down: Tensor = self.lora_down(x)
        if drops:
            down = self._drop(down)
        # The factor is applied to the r channels of down: cheaper than to the output, and the same.
        change: Tensor = self.lora_up(down * (self.multiplier * self._scale))
        return original + change

    def _drop(self, down: Tensor) -> Tensor:
        if self.dropouts.neuron:
            down = nn.functional.dropout(down, self.dropouts.neuron)
        if self.dropouts.rank:
            keep = 1.0 - self.dropouts.rank
            kept = torch.rand(down.shape[0], self.rank, device=down.device) < keep
            inner = [1] * (down.ndim - 2)
            shape = [-1, *inner, self.rank] if isinstance(self.layer, nn.Linear) else [-1, self.rank, *inner]
            down = down * (kept.to(down.dtype) / keep).view(shape)
        return down

    def change(self) -> Tensor:
        """``(alpha / rank) * up @ down`` in float32, in the shape of the layer's weight; without the multiplier."""
        up, down = self.lora_up.weight.float(), self.lora_down.weight.float()
        return (up.flatten(1) @ down.flatten(1)).reshape(self.layer.weight.shape) * self._scale

    def change_norm(self) -> Tensor:
        """Frobenius norm of :meth:`change` (0-d float32), by ``|UD|^2 = tr(U^T U D D^T)``, so without building it."""
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * self._scale


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
