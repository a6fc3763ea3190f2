"""Number formats of saved weights."""

from collections.abc import Mapping
from typing import Final

import torch

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Number formats by the names that options have for them."""


def save_dtype(precision: str | None) -> torch.dtype | None:
    """The dtype that ``--save_precision`` names; None, where it is absent, leaves each tensor as it is."""
    return None if precision is None else DTYPES[precision]
