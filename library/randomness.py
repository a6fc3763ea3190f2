"""Random numbers by address: every draw has a key that says what it is for, and no draw depends on an earlier one.

A key is the tuple ``(seed, purpose, ...)``, for instance ``(seed, "noise", epoch, example)``; its BLAKE2b hash seeds a
fresh generator. So the number of loader workers, previews, validation and resuming cannot change a run: nothing on the
training path reads a global generator. Code that is not ours and does (dropout, third-party adapters) runs inside
:func:`seeded_globals`.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KeyPart = int | str


def key(*parts: KeyPart) -> int:
    """The 63-bit seed at the address ``parts``, equal on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def python_random(*parts: KeyPart) -> random.Random:
    """A Python generator for the address ``parts``."""
    return random.Random(key(*parts))


def torch_generator(*parts: KeyPart) -> "torch.Generator":
    """A CPU generator for the address ``parts``: draws are made on the CPU, so every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(key(*parts))


@contextmanager
def seeded_globals(*parts: KeyPart) -> Iterator[None]:
    """Seed the global Python and torch generators for the block, and put them back afterwards."""
    import torch

    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    seed = key(*parts)
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
