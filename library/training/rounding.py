"""Weights kept in bf16: optimizer steps in float32, rounded stochastically, so that small steps are not lost.

bf16 has 8 significant bits: a step below 1/256 of a weight vanishes when rounded to the nearest. Rounded up or down by
chance, in proportion to the distance, it is kept on average (Gupta et al. 2015, arXiv 1502.02551, section 4.1; Zamirai
et al. 2020, arXiv 2010.06192).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LOW_BITS = 16
"""Bits of a float32 that bf16 does not have."""


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """``values`` (float32) as bf16, each rounded to one of its two neighbours, with the value itself as expectation.

    Values that bf16 holds exactly stay what they are, and so do infinities and NaN.
    """
    assert values.dtype == torch.float32, values.dtype
    chance = torch.randint(
        0, 1 << _LOW_BITS, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    # Carries from the low bits into the high ones make the larger neighbour.
    bits = chance.add_(values.view(torch.int32)).bitwise_and_(-1 << _LOW_BITS)
    # Narrow before anything else is made: for the largest weights every copy counts.
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


@contextmanager
def widened(parameter: Tensor, state: dict[str, Any], generator: torch.Generator) -> Iterator[None]:
    """Inside the block a bf16 ``parameter``, its gradient and its optimizer state are float32; afterwards bf16 again.

    Of the state, tensors of the parameter's shape are meant: moments. Other entries (step counts, 8-bit state with its
    scales, what is paged or on another device) stay as the optimizer keeps them.

    Args:
        parameter: A trained weight that has a gradient.
        state: The optimizer's state of it, empty before the first step; changed in place.
        generator: On the parameter's device.
    """
    narrow = parameter.data
    assert parameter.grad is not None, "only weights with a gradient are stepped"
    gradient, parameter.grad = parameter.grad.float(), None
    parameter.data = narrow.float()
    parameter.grad = gradient
    # A name that lives on would keep it until the moments are rounded.
    del gradient
    moments = {name: value for name, value in state.items() if _is_moment(name, value, narrow, torch.bfloat16)}
    state.update({name: value.float() for name, value in moments.items()})
    try:
        yield
    finally:
        parameter.grad = None
        # Into the same memory as before: what lives on must not be scattered among what is freed.
        narrow.copy_(stochastic_round(parameter.data, generator))
        parameter.data = narrow
        for name, value in state.items():
            if _is_moment(name, value, narrow, torch.float32):
                rounded = stochastic_round(value, generator)
                state[name] = moments[name].copy_(rounded) if name in moments else rounded


def _is_moment(name: str, value: object, parameter: Tensor, dtype: torch.dtype) -> bool:
    # A count has the shape of a weight that is a single number.
    if name == "step" or not isinstance(value, Tensor):
        return False
    # bitsandbytes pages its own memory only, which torch takes for the CPU's: no copy of it would be.
    is_elsewhere = value.device != parameter.device or getattr(value, "is_paged", False)
    return value.shape == parameter.shape and value.dtype == dtype and not is_elsewhere
