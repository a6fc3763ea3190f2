from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.faults.disks import SmallDisk, mounted
from tests.faults.runs import arguments, train
from tests.scripts.runs import Run
from tests.tiny import tiny_sd


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a LoRA is quickly trained."""
    return tiny_sd(tmp_path_factory.mktemp("faults") / "base", layers_per_block=1, channels=(16, 16, 32, 32))


@pytest.fixture(scope="session")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """``plain(4)``: a run of four steps in which nothing goes wrong."""

    @cache
    def run(steps: int) -> Run:
        folder = tmp_path_factory.mktemp("plain")
        return train(folder / "out", *arguments(model, folder, "--save_every_n_steps=1", "--save_state", steps=steps))

    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", megabytes=16) as made:
        yield made
