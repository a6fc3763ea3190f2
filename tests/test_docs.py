"""The pages in ``docs/`` that are made from the code are current."""

from pathlib import Path

import pytest

from tools.option_tables import SCRIPTS, table

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_option_tables_are_current(script: str) -> None:
    written = (DOCS / "options" / f"{script}.md").read_text(encoding="utf-8")
    assert written == table(script), "run: python tools/option_tables.py"
