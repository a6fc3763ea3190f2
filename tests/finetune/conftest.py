"""Tiny models for the tools, written once a session; not to be written to."""

from pathlib import Path

import pytest

from tests.finetune import tiny_models


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="session")
def git_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_git(tmp_path_factory.mktemp("git"))


@pytest.fixture(scope="session")
def tagger_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tagger(tmp_path_factory.mktemp("tagger"))
