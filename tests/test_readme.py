"""Every command and every data set in the documentation is one that the program takes."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from library.option_sources import config_path
from library.options import parse_options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for indent, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind in languages:
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append((page.name, "\n".join(lines)))
    return found


def commands(script: str) -> list[tuple[str, list[str]]]:
    found = []
    for page, text in blocks("bash", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for number, word in enumerate(words):
                if Path(word).name == script and ("python" in words[0] or words[0] in ("accelerate", "torchrun")):
                    found.append((page, words[number + 1 :]))
    return found


SCRIPTS = ("train_network", "train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI")
COMMANDS = [(script, page, arguments) for script in SCRIPTS for page, arguments in commands(f"{script}.py")]


@pytest.mark.parametrize(("script", "page", "arguments"), COMMANDS)
def test_commands_are_taken(
    script: str, page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = importlib.import_module(script).Options
    # The pages speak of files that readers have; only the options are looked at here.
    monkeypatch.chdir(tmp_path)
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, joined = name.partition("=")
        if flag == "--config_file":
            path = Path(joined or value)
            shipped = ROOT / config_path(str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shipped.read_text(encoding="utf-8") if shipped.exists() else "", encoding="utf-8")
    parse_options(options, arguments, prog=f"{script}.py", description="")


@pytest.mark.parametrize("script", SCRIPTS)
def test_there_are_commands(script: str) -> None:
    assert len(commands(f"{script}.py")) >= (3 if script == "train_network" else 1)


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_data_sets_are_taken(page: str, text: str, tmp_path: Path) -> None:
    from library.data.config import read_spec
    from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions

    if "datasets" not in tomllib.loads(text):
        return
    path = tmp_path / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    spec, findings = read_spec(SourceOptions(dataset_config=path), ImageOptions(), CaptionOptions(), CacheOptions())
    assert spec.datasets
    assert not [finding for finding in findings if finding.severity == "error"]
