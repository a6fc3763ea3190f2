"""Checkpoints whose inputs wait in main memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from library.models.checkpointing import use_checkpointing
from tests.tiny import tiny_parts


def gradient(offload: bool | None) -> Tensor:
    unet = tiny_parts("sd1", layers_per_block=1).unet
    generator = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 64, generator=generator)
    text.requires_grad_()
    unet.train()
    if offload is not None:
        use_checkpointing(unet, offload=offload)
    unet(noisy, torch.tensor([3, 500]), text).sample.square().sum().backward()
    assert text.grad is not None
    return text.grad


def test_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    original = torch.autograd.graph.save_on_cpu

    class Watched(original):  # type: ignore[valid-type, misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            pack = self.pack_hook

            def watched(tensor: Tensor) -> Any:
                moved.append(tensor.shape)
                return pack(tensor)

            self.pack_hook = watched

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    plain = gradient(None)
    assert torch.equal(gradient(offload=False), plain)
    assert not moved
    assert torch.equal(gradient(offload=True), plain)
    # Latents and text of every block go through main memory, and nothing from inside the blocks.
    assert torch.Size([2, 77, 64]) in moved
    assert 10 < len(moved) < 120
