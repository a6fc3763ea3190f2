"""Fixtures for every test: tiny models, written once a session; one thread, which small tensors are quickest with."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.fresh import forget_accelerate
from tests.tiny import Kind, tiny_ldm, tiny_sd


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate() -> None:
    """A file's tests do not see the settings of those that ran before; within a file, tests may share a runtime."""
    forget_accelerate()


@pytest.fixture
def accelerate_anew() -> None:
    """For tests that each start a run of their own."""
    forget_accelerate()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors are slower on several threads, and sums are then the same on every machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """``tiny_folder("sd1")``: a diffusers folder, the same one for every test; not to be written to."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda kind: tiny_sd(root / kind, kind))


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_file("sd1", ".ckpt")``: the same model as :func:`tiny_folder` in one file; not to be written to."""
    root = tmp_path_factory.mktemp("tiny_ldm")

    @cache
    def make(kind: Kind, suffix: str = ".safetensors") -> Path:
        return tiny_ldm(root, kind, suffix)

    return make
