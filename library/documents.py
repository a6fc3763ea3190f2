"""Text, JSON and TOML that others may have written: read within limits, so that no file can stop or fill the program.

Python's own parsers run into its recursion limit, take seconds for a number of a million digits, keep the last of
repeated keys, and make texts that no file name and no terminal can hold. Every such text is a :class:`DocumentError`
here. Importing this module imports nothing heavy.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Final

MOST_LEVELS: Final = 64
"""Depth of lists and tables; files that people and programs write for training have fewer than ten."""

_LONGEST_NAME: Final = 255
_LONGEST_PATH: Final = 4000

_SMALLEST: Final = -(2**63)
_LARGEST: Final = 2**64 - 1

_NOT_TEXT: Final = re.compile("[\0\ud800-\udfff]")
_UNPRINTABLE: Final = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_ENDS: Final = re.compile("[\n\t]")

# A key of so many parts; the standard parser takes time with the square of their number.
_NAME: Final = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY: Final = re.compile(rf"(?:^|[\[{{,])[ \t]*{_NAME}(?:[ \t]*\.[ \t]*{_NAME}){{{MOST_LEVELS}}}", re.MULTILINE)


class DocumentError(ValueError):
    """Text that cannot be used; the message says why.

    Attributes:
        line: The line where the parser stopped, counted from 1, where it tells.
    """

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; a byte-order mark is no part of it.

    Raises:
        DocumentError: It is no UTF-8.
        OSError: It cannot be read.
    """
    return decode_text(path.read_bytes())


def decode_text(content: bytes) -> str:
    """As :func:`read_text`, of a file's content."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as mistake:
        raise DocumentError(f"it is not UTF-8 (byte {mistake.start})") from mistake


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DocumentError: It is no JSON, or beyond the limits of :func:`parse_json`.
        OSError: It cannot be read.
    """
    return parse_json(read_text(path))


def read_table(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DocumentError: It is no JSON object, or beyond the limits of :func:`parse_json`.
        OSError: It cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DocumentError("it holds no JSON object")
    return content


def parse_json(text: str | bytes | bytearray) -> Any:
    """What a JSON text holds.

    Raises:
        DocumentError: It is no JSON, nested too deeply, has a number beyond 64 bits, gives a key of a table twice, or a
            text that no file can hold.
    """
    content = load_json(text, object_pairs_hook=_without_repeats)
    _check_texts(content)
    return content


def load_json(text: str | bytes | bytearray, **hooks: Any) -> Any:
    """As :func:`parse_json`, but with any text, and the last of repeated keys; ``hooks`` are those of the parser."""
    try:
        content = json.loads(text, **hooks)
    except DocumentError:
        raise
    except json.JSONDecodeError as mistake:
        raise DocumentError(f"it is no JSON ({mistake.msg}, line {mistake.lineno})", mistake.lineno) from mistake
    except UnicodeDecodeError as mistake:
        raise DocumentError(f"it is not UTF-8 (byte {mistake.start})") from mistake
    except RecursionError as mistake:
        raise DocumentError("it is nested too deeply") from mistake
    except ValueError as mistake:
        raise DocumentError("it has a number of too many digits") from mistake
    _check_size(content)
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text holds.

    Raises:
        DocumentError: It is no TOML, nested too deeply, has a number beyond 64 bits, or a text that no file can hold.
    """
    if _LONG_KEY.search(text):
        raise DocumentError("it is nested too deeply")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as mistake:
        line = re.search(r"line (\d+)", str(mistake))
        raise DocumentError(f"it is not valid TOML: {mistake}", int(line[1]) if line else None) from mistake
    except RecursionError as mistake:
        raise DocumentError("it is nested too deeply") from mistake
    except ValueError as mistake:
        raise DocumentError("it has a number of too many digits") from mistake
    _check_size(content)
    _check_texts(content)
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DocumentError(f"'{printable(repeated)}' is given twice")
    return table


def _check_size(content: object) -> None:
    """Refuse deep nesting, and whole numbers that other programs and files have no place for."""
    level: list[object] = [content]
    for _ in range(MOST_LEVELS):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int) and not _SMALLEST <= value <= _LARGEST:
                raise DocumentError("it has a whole number beyond 64 bits")
        if not inner:
            return
        level = inner
    raise DocumentError("it is nested too deeply")


def _check_texts(content: object) -> None:
    """Refuse texts with NUL or with halves of characters; the depth of ``content`` is checked already."""
    values: list[object] = [content]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value)
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, str) and not is_text(value):
            raise DocumentError(f"it has a text that no file can hold: '{printable(value[:40])}'")


def is_text(text: str) -> bool:
    """Whether ``text`` can stand in a file: JSON can escape NUL, and halves of characters."""
    return (text.isascii() and "\0" not in text) or not _NOT_TEXT.search(text)


def printable(text: str) -> str:
    r"""``text`` on one line, with what would move a terminal's cursor, colour it or turn its direction as ``\x1b``."""
    return _UNPRINTABLE.sub(_escaped, text) if not text.isprintable() else text


def printable_lines(text: str) -> str:
    """As :func:`printable`, with line ends and tabs kept."""
    return _UNPRINTABLE.sub(lambda match: match[0] if _LINE_ENDS.match(match[0]) else _escaped(match), text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "backslashreplace").decode("ascii")


def path_objection(text: str) -> str | None:
    """Why ``text`` cannot be a path on any usual system; None where it can."""
    if "\0" in text:
        return "a path has no NUL"
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) > _LONGEST_PATH or max(map(len, re.split(rb"[\\/]", encoded))) > _LONGEST_NAME:
        return f"a path has at most {_LONGEST_PATH} bytes, and a name in it {_LONGEST_NAME}"
    return None


def home_expanded(path: Path) -> Path:
    """``path`` with ``~`` replaced by the home folder; as it is where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path
