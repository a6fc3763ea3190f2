"""One rotation of a layer's outputs (OFT, https://arxiv.org/abs/2306.07280), in its constrained form."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from networks.adapter_files import OFT_BLOCKS
from networks.base import Attachment, Layer


class OFTModule(nn.Module):
    """``W' = R^T W`` for one layer, without touching ``W``; the bias stays.

    ``R`` is block-diagonal. Each block is ``(I + Q)(I - Q)^-1`` (Cayley) of a skew-symmetric ``Q = B - B^T``, so it is
    a rotation. All ``Q`` of the layer together are scaled down to the Frobenius norm ``alpha * outputs`` where they
    exceed it. At another strength than 1, ``R`` is ``I + multiplier * (R - I)``. ``B`` (``oft_blocks``, (blocks,
    outputs / blocks, outputs / blocks)) starts at 0, so a new module changes nothing.
    """

    alpha: Tensor

    def __init__(
        self, lora_name: str, layer: Layer, *, blocks: int, constraint: float, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        outputs = layer.weight.shape[0]
        assert outputs % blocks == 0, "checked before"
        size = outputs // blocks
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.oft_blocks = nn.Parameter(torch.zeros(blocks, size, size))
        self.register_buffer("alpha", torch.tensor(float(constraint)))
        # A plain number beside the buffer: reading a tensor in forward would wait for the GPU.
        self._largest_norm = constraint * outputs
        self.register_load_state_dict_post_hook(_read_constraint)  # type: ignore[no-untyped-call]
        self._attachment = Attachment(lora_name, layer)

    @property
    def layer(self) -> Layer:
        """The layer that is changed."""
        return self._attachment.layer

    @property
    def constraint(self) -> float:
        """The largest norm of ``Q``, divided by the number of outputs."""
        return self._largest_norm / self.layer.weight.shape[0]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Start from no rotation; nothing is drawn, so ``seed`` does not matter."""
        self.oft_blocks.zero_()

    def attach(self) -> None:
        """Make the layer compute with this module."""
        self._attachment.attach(self.forward)

    def detach(self) -> None:
        """Let the layer compute without this module again; the last one attached to a layer goes first."""
        self._attachment.detach()

    def trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The blocks; nothing has a rate of its own."""
        return [self.oft_blocks], []

    def turn(self) -> Tensor:
        """``R - I``, (blocks, n, n) float32, at strength 1."""
        # The solver has no half precision, and 1 + 0.001 none to spare.
        with torch.autocast(self.oft_blocks.device.type, enabled=False):
            blocks = self.oft_blocks.float()
            skew = blocks - blocks.transpose(1, 2)
            norm = torch.linalg.vector_norm(skew)
            skew = skew * (self._largest_norm / norm.clamp(min=self._largest_norm))
            identity = torch.eye(skew.shape[-1], device=skew.device)
            # (I + Q)(I - Q)^-1 - I = 2 (I - Q)^-1 Q
            # Always solvable; torch.linalg.solve would wait for the GPU to look whether it is.
            turn: Tensor = torch.linalg.solve_ex(identity - skew, 2 * skew)[0]
            return turn

    def forward(self, x: Tensor) -> Tensor:
        """The changed layer's output for ``x``: (..., in) for linear, (B, in, H, W) for a convolution."""
        original = self._attachment.original(x)
        layer = self.layer
        channels = original if isinstance(layer, nn.Linear) else original.movedim(1, -1)
        unbiased = channels if layer.bias is None else channels - layer.bias.to(channels.dtype)
        turn = (self.turn() * self.multiplier).to(channels.dtype)
        parts = unbiased.reshape(*unbiased.shape[:-1], *turn.shape[:2])
        change = torch.einsum("...kn,knm->...km", parts, turn).flatten(-2)
        return original + (change if isinstance(layer, nn.Linear) else change.movedim(-1, 1))

    def is_in(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether a network file holds this module."""
        return self.lora_name + OFT_BLOCKS in weights

    def change(self) -> Tensor:
        """``(R - I)^T W`` in float32, in the shape of the layer's weight; without the multiplier."""
        turn = self.turn()
        weight = self.layer.weight.to(turn.device, torch.float32)
        parts = weight.reshape(*turn.shape[:2], -1)
        return torch.einsum("knm,kni->kmi", turn, parts).reshape(weight.shape)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Rotate the layer's weight, computed in float32 and rounded to ``dtype``."""
        weight = self.layer.weight
        self.to(device or weight.device)
        merged = weight.to(self.oft_blocks.device, torch.float32) + self.change() * self.multiplier
        weight.copy_(merged.to(dtype or torch.float32))

    @torch.no_grad()
    def change_norm(self) -> Tensor:
        """Frobenius norm of :meth:`change`, 0-d float32."""
        norm: Tensor = torch.linalg.vector_norm(self.change())
        return norm

    def scale_change(self, factor: Tensor) -> None:
        """A part of a rotation is none, so only 1 is possible; ``--scale_weight_norms`` is refused beforehand."""
        assert bool(factor == 1), "a rotation is limited by its alpha"


def _read_constraint(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, OFTModule)
    module._largest_norm = float(module.alpha) * module.layer.weight.shape[0]
