"""Frozen weights in 8 bits: stored as float8_e4m3fn, widened layer by layer whenever they are computed with.

Matrices and convolutions hold nearly all of a model; they alone are narrowed. Norms, biases and embeddings stay as they
are, as rounding them costs much and saves little. e4m3fn has 4 significant bits and reaches from 2^-9 to 448
(Micikevicius et al. 2022, arXiv 2209.05433).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from library.errors import UserError
from library.models.stable_diffusion import StableDiffusion
from library.runtime_options import RuntimeOptions

STORAGE: Final = torch.float8_e4m3fn
_LARGEST: Final = torch.finfo(STORAGE).max


def narrow_base(model: StableDiffusion, options: RuntimeOptions, *, dtype: torch.dtype) -> None:
    """Store in 8 bits what ``options`` ask for of a frozen ``model``; see :func:`narrow_weights`."""
    if options.narrows_base:
        narrow_weights(model.unet, dtype=dtype, part="U-Net")
    if options.fp8_base:
        narrow_weights(model.text_encoder, dtype=dtype, part="text encoder")


def narrow_weights(module: nn.Module, *, dtype: torch.dtype, part: str) -> None:
    """Store the matrices and convolutions of a frozen ``module`` in 8 bits; they compute in ``dtype``.

    Adapters are attached afterwards, since the ``forward`` of these layers is replaced on the instance. State dicts
    keep their names.

    Args:
        module: A model without trained weights; changed in place.
        dtype: What the layers compute in.
        part: Its name for messages.

    Raises:
        UserError: A weight is too large for the format.
    """
    for name, layer in _layers(module):
        assert not layer.weight.requires_grad, "trained weights are not rounded"
        if float(layer.weight.abs().max()) > _LARGEST:
            raise UserError(
                f"a weight of the {part} ({name}) is larger than 8 bits can hold ({_LARGEST:g})",
                where="--fp8_base" if part != "U-Net" else "--fp8_base, --fp8_base_unet",
                remedy="Leave it out for this model.",
            )
        layer.weight.data = layer.weight.data.to(STORAGE)
        patched: nn.Module = layer
        if isinstance(layer, nn.Linear):
            patched.forward = partial(_linear, layer, dtype)
        else:
            patched.forward = partial(_convolve, layer, dtype)


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d))


def _linear(layer: nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    """What ``layer`` makes of ``x``, in ``dtype``."""
    result: Tensor = _Linear.apply(x.to(dtype), layer.weight)  # type: ignore[no-untyped-call]
    return result if layer.bias is None else result + layer.bias.to(dtype)


def _convolve(layer: nn.Conv2d, dtype: torch.dtype, x: Tensor) -> Tensor:
    """What ``layer`` makes of ``x``, in ``dtype``."""
    assert layer.padding_mode == "zeros", "Stable Diffusion pads with zeros"
    shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
    result: Tensor = _Convolution.apply(x.to(dtype), layer.weight, *shape)  # type: ignore[no-untyped-call]
    return result if layer.bias is None else result + layer.bias.to(dtype)[:, None, None]


class _Linear(torch.autograd.Function):
    """x @ W^T. Keeps the narrow weight for the backward pass, where torch's own would keep the wide copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ weight.to(gradient.dtype), None


class _Convolution(torch.autograd.Function):
    """The convolution of x with W; keeps the narrow weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.shape = x.shape, (stride, padding, dilation, groups)
        with torch.autocast(x.device.type, enabled=False):
            return functional.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        wide = weight.to(gradient.dtype)
        by_x = conv2d_input(ctx.size, wide, gradient, *ctx.shape)  # type: ignore[no-untyped-call]
        return by_x, None, None, None, None, None
