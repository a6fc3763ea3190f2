"""The text of ``--help``: options by topic, each with its value, meaning, default and choices."""

import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from library.option_fields import Declared
from library.option_values import is_switch, is_variadic

_INDENT: Final = 6
_WIDTHS: Final = (60, 110)  # columns: narrowest and widest text
_NOTES: Final = """\
Options come from --config_file first and from the command line last, which wins. A flag may be cut short as long as \
it stays clear (--output_d). --no_X switches the switch --X off, for instance one that the configuration file sets. \
Options for several values take everything up to the next flag."""


def help_text(declared: Iterable[Declared], *, prog: str, description: str) -> str:
    """The whole text, as wide as the terminal within reason."""
    width = min(max(shutil.get_terminal_size().columns, _WIDTHS[0]), _WIDTHS[1])
    lines = [f"usage: {prog} [--config_file FILE] [options]", "", *textwrap.wrap(description, width), ""]
    lines += _section("Configuration file", _CONFIGURATION, width)
    by_title: dict[str, list[tuple[str, str]]] = {}
    for item in declared:
        by_title.setdefault(item.title, []).append((_usage(item), _explanation(item)))
    for title, entries in by_title.items():
        lines += _section(title, entries, width)
    return "\n".join([*lines, *textwrap.wrap(_NOTES, width)]) + "\n"


_CONFIGURATION: Final = [
    ("--config_file FILE", 'TOML file with options by name; sections are optional, ".toml" may be left out.'),
    ("--output_config", "Write the options that are not the default to --config_file, a new file, and end."),
    ("-h, --help", "Show this text and end."),
]


def _section(title: str, entries: Iterable[tuple[str, str]], width: int) -> list[str]:
    lines = [f"{title}:"]
    for usage, explanation in entries:
        lines.append(f"  {usage}")
        margin = " " * _INDENT
        lines += textwrap.wrap(explanation, width, initial_indent=margin, subsequent_indent=margin)
    return [*lines, ""]


def _usage(item: Declared) -> str:
    flags = ", ".join(f"--{name}" for name in (item.name, *item.facts.flag_aliases))
    if is_switch(item):
        return flags
    metavar = item.facts.metavar or ("VALUE" if item.facts.choices is None else "|".join(map(str, item.facts.choices)))
    if item.facts.choices is not None and len(metavar) > 60:
        metavar = "NAME"
    return f"{flags} {metavar}{' ...' if is_variadic(item.type) else ''}"


def _explanation(item: Declared) -> str:
    parts = [item.facts.help]
    if item.facts.choices is not None and not _usage(item).endswith(str(item.facts.choices[-1])):
        parts.append(f"One of {', '.join(map(str, item.facts.choices))}.")
    if item.default not in (None, (), "", False):
        parts.append(f"[default: {_shown(item.default)}]")
    return " ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return value.as_posix() if isinstance(value, Path) else str(value)
