"""``docs/captioning.md`` names every option of the three tools with its default and its meaning."""

import importlib
import re

import pytest

from library.option_fields import declarations
from tests.finetune.runs import ROOT

PAGE = (ROOT / "docs" / "captioning.md").read_text(encoding="utf-8")
SECTIONS = {
    "make_captions": "## make_captions.py: BLIP",
    "make_captions_by_git": "## make_captions_by_git.py: GIT",
    "tag_images_by_wd14_tagger": "## tag_images_by_wd14_tagger.py",
}


@pytest.mark.parametrize("tool", SECTIONS)
def test_every_option_is_described_as_it_is(tool):
    _, _, section = PAGE.partition(SECTIONS[tool] + "\n")
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*) \|$", section.split("\n## ")[0], re.MULTILINE)
    declared = declarations(importlib.import_module(f"finetune.{tool}").Options)
    shown = {name: item for name, item in declared.items() if item.group != "console"}
    assert [name for name, _, _ in rows] == list(shown)
    for name, default, meaning in rows:
        value = shown[name].default
        expected = "off" if value is False else "" if value in (None, "") else f"`{value}`"
        assert (default, meaning) == (expected, shown[name].facts.help.replace("|", "\\|")), name
