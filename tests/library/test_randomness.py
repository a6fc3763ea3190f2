"""Keys: the same everywhere, and no draw disturbs another."""

import random
import subprocess
import sys

import pytest
import torch

from library.randomness import key, python_random, seeded_globals, torch_generator


def test_a_key_is_the_same_in_every_process() -> None:
    code = "from library.randomness import key; print(key(7, 'noise', 1, 3))"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert seen == {f"{key(7, 'noise', 1, 3)}\n".encode()}


def test_a_key_never_changes() -> None:
    """Results of earlier versions could not be repeated otherwise."""
    assert key(7, "noise", 1, 3) == 9044370059339570093


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, "a"), (1, "b")), ((1, 12), (11, 2)), ((1, "2"), (1, 2)), (("a", "b"), ("ab",)), ((1,), (2,))],
)
def test_different_addresses_have_different_keys(one: tuple, other: tuple) -> None:
    assert key(*one) != key(*other)


def test_generators_repeat() -> None:
    assert python_random(1, "x").random() == python_random(1, "x").random()
    first, second = (torch.rand(3, generator=torch_generator(1, "x")) for _ in range(2))
    assert torch.equal(first, second)


def test_global_generators_are_put_back() -> None:
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1).item()
    random.seed(5)
    torch.manual_seed(5)
    with seeded_globals(1, "init"):
        inside = random.random(), torch.rand(1).item()
    assert (random.random(), torch.rand(1).item()) == expected
    with seeded_globals(1, "init"):
        assert (random.random(), torch.rand(1).item()) == inside
