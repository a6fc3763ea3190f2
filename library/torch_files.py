"""Torch files (``.ckpt``, ``.pt``, ``.bin``): nothing in them is ever run, only tensors and plain values are made."""

import pickle
from pathlib import Path
from typing import Any, Final

from library.tensor_headers import check_archive

_LONGEST_MESSAGE: Final = 500


class _Ignored:
    """Stands for a class whose objects mean nothing here."""


class _ShortError(pickle.UnpicklingError):
    """Says no more than anybody reads: torch searches its own messages in time that grows with the square of them."""

    def __init__(self, message: object = "") -> None:
        super().__init__(str(message)[:_LONGEST_MESSAGE])


def load_plain(path: Path, *, mapped: bool = False) -> Any:
    """What the torch file ``path`` holds, on the CPU.

    Args:
        path: The file.
        mapped: Map its tensors into memory, so that only those in use are read.

    Raises:
        UnpicklingError: It asks for more than tensors and plain values.
        HeaderError: It grows when it is unpacked.
        Exception: Whatever its bytes make torch stumble over.
    """
    import torch
    from torch import _weights_only_unpickler

    check_archive(path)
    # A class name of a megabyte, which a file may have, would take hours to be refused.
    _weights_only_unpickler.UnpicklingError = _ShortError  # type: ignore[attr-defined,assignment]
    # Stable Diffusion's first checkpoints name this class of their trainer; a name is all that is made of it.
    with torch.serialization.safe_globals([(_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
