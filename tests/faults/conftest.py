from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.disks import SmallDisk, mounted
from tests.tiny import tiny_sd


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a LoRA is quickly trained."""
    return tiny_sd(tmp_path_factory.mktemp("faults") / "base", layers_per_block=1, channels=(16, 16, 32, 32))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", megabytes=16) as made:
        yield made
