"""Gradient checkpointing: of the U-Net, whose stored activations may wait in main memory, and of the text encoder."""

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


def use_text_checkpointing(text_encoder: Any) -> None:
    """Let the layers of ``text_encoder``, a ``CLIPTextModel``, be computed again in the backward pass.

    They are only in training mode, where it differs in nothing else: CLIP has no dropout.
    """
    text_encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    text_encoder.train()


def _offloading(block: Callable[..., Any], *given: Any) -> Any:
    """``block(*given)``; what it was given is kept on the CPU, and copied back when the block is computed again."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(block, *given, use_reentrant=False)
