from pathlib import Path

import pytest

from tests.networks.tool_runs import write_inputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the network files of the golden cases in it."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
