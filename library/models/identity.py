"""A quick digest of weights that stay as they are: which model a run has been trained with."""

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_VALUES: Final = 64
"""Values taken from each tensor, evenly spread: reading all of a model would take as long as loading it."""


def frozen_digest(module: "nn.Module", weights: "Mapping[str, Tensor] | None" = None) -> str:
    """BLAKE2b, 64 bits in hexadecimal, of a sample of every tensor of ``module`` that is not trained.

    Args:
        module: The module.
        weights: Its weights, where it has not taken them yet.
    """
    import torch

    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted((module.state_dict() if weights is None else weights).items()):
        if name in trained:
            continue
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // _VALUES)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()
