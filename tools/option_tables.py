"""Write the table of a script's options to ``docs/options/<script>.md``, from the declarations themselves.

Usage: ``python tools/option_tables.py`` from anywhere; a test tells when a table is out of date.
"""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.option_fields import Declared, declarations  # noqa: E402
from library.option_values import is_switch  # noqa: E402

SCRIPTS = ("train_network", "train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI")


def table(script: str) -> str:
    """The page for ``script``: a section a topic, a row an option."""
    options = importlib.import_module(script).Options
    lines = [
        f"# Options of `{script}.py`",
        "",
        "Every option can stand on the command line (`--name value`) or in the file given by `--config_file`",
        "(`name = value`); the command line wins. This page is written by `python tools/option_tables.py`.",
    ]
    title = ""
    for declared in declarations(options).values():
        if declared.title != title:
            title = declared.title
            lines += ["", f"## {title}", "", "| option | default | meaning |", "| --- | --- | --- |"]
        lines.append(row(declared))
    return "\n".join(lines) + "\n"


def row(declared: Declared) -> str:
    """An option in a table of name, default and meaning."""
    return f"| `--{declared.name}` | {_default(declared)} | {_meaning(declared)} |"


def _default(declared: Declared) -> str:
    if is_switch(declared):
        return "off"
    if declared.default in (None, "", ()):
        return ""
    return f"`{declared.default}`"


def _meaning(declared: Declared) -> str:
    text = declared.facts.help
    if declared.facts.choices:
        text += f" One of {_listed(declared.facts.choices)}."
    return text.replace("|", "\\|")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def main() -> None:
    """Write every table."""
    for script in SCRIPTS:
        path = ROOT / "docs" / "options" / f"{script}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(script), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
