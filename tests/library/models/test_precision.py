"""What ``--save_precision`` means."""

import pytest
import torch

from library.models.precision import save_dtype
from library.training.options import SaveOptions


@pytest.mark.parametrize(
    ("name", "dtype"), [(None, None), ("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_every_choice_has_its_dtype(name: str | None, dtype: torch.dtype | None) -> None:
    assert SaveOptions(save_precision=name).save_precision == name
    assert save_dtype(name) is dtype
