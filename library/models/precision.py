"""Number formats of saved weights."""

from collections.abc import Mapping
from typing import Final

import torch

_BY_NAME: Final[Mapping[str, torch.dtype]] = {
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def save_dtype(precision: str | None) -> torch.dtype | None:
    """The dtype that ``--save_precision`` names; None, where it is absent, leaves each tensor as it is."""
    return None if precision is None else _BY_NAME[precision]
