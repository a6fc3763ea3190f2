"""Gradient checkpointing of the U-Net whose stored activations wait in main memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def use_checkpointing(unet: Any, *, offload: bool) -> None:
    """Let the blocks of ``unet`` be computed again in the backward pass.

    Args:
        unet: A ``UNet2DConditionModel``.
        offload: Keep what enters each block in main memory until then, which on a GPU trades time for its memory.
    """
    unet.enable_gradient_checkpointing(_offloading if offload else None)


def _offloading(block: Callable[..., Any], *given: Any) -> Any:
    """``block(*given)``; what it was given is kept on the CPU, and copied back when the block is computed again."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(block, *given, use_reentrant=False)
