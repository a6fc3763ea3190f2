"""On which line of a TOML or JSON text a key stands, so that messages can name it.

The parsers of the standard library do not tell. Paths are tuples of keys and list positions, such as
``("datasets", 0, "subsets", 1, "image_dir")``. What stands inside an inline table has no line of its own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_NAME: Final = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED: Final = rf"{_NAME}(?:\s*\.\s*{_NAME})*"
_HEADER: Final = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]")
_ASSIGNMENT: Final = re.compile(rf"\s*({_DOTTED})\s*=")
_LONG_QUOTES: Final = re.compile(r'"""|\'\'\'')
_JSON_TOKEN: Final = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\],:]')


def line_of(path: KeyPath, lines: Mapping[KeyPath, int]) -> int | None:
    """The line of ``path``, or of the nearest table around it."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def toml_lines(text: str) -> dict[KeyPath, int]:
    """Lines, counted from 1, of the tables and keys of a valid TOML text."""
    lines: dict[KeyPath, int] = {}
    lengths: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in _plain_lines(text):
        if header := _HEADER.match(line):
            table = _open_table(_names(header[2]), header[1] == "[[", lengths)
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault(table + _names(assignment[1]), number)
    return lines


def _plain_lines(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines that do not begin inside a multi-line string."""
    closing = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not closing:
            yield number, line
        for quotes in _LONG_QUOTES.findall(line):
            if not closing:
                closing = quotes
            elif quotes == closing:
                closing = ""


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip("\"'") for name in re.findall(_NAME, dotted))


def _open_table(names: tuple[str, ...], is_array: bool, lengths: dict[KeyPath, int]) -> KeyPath:
    """The path of the table that a header opens; ``lengths`` counts the tables of each array so far."""
    path: KeyPath = ()
    for position, name in enumerate(names):
        path += (name,)
        if is_array and position == len(names) - 1:
            lengths[path] = lengths.get(path, 0) + 1
        if path in lengths:
            path += (lengths[path] - 1,)
    return path


def json_lines(text: str) -> dict[KeyPath, int]:
    """Lines, counted from 1, of the objects and keys of a valid JSON text."""
    lines: dict[KeyPath, int] = {}
    path: list[str | int] = []
    waiting: str | None = None
    line, counted = 1, 0
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        line, counted = line + text.count("\n", counted, match.start()), match.start()
        if token == "[":
            path.append(0)
        elif token == "{":
            lines.setdefault(tuple(path), line)
            path.append("")
        elif token in ("}", "]"):
            path.pop()
        elif token == ",":
            last = path[-1]
            path[-1] = last + 1 if isinstance(last, int) else ""
        elif token == ":" and waiting is not None:
            path[-1] = waiting
            lines.setdefault(tuple(path), line)
        waiting = token[1:-1] if token[0] == '"' else None
    return lines
