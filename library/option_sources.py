"""Where options are given: the command line and a TOML file. Both end as names with what was written, and the place."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from library.documents import DocumentError, decode_text, home_expanded, parse_toml
from library.errors import Problem
from library.option_fields import Declared
from library.option_foreign import FOREIGN_KEYS
from library.option_values import did_you_mean, is_switch, is_variadic, near_remedy

CONFIG_FLAGS: Final = ("config_file", "output_config")
"""Flags that every script has and that say where options come from or go to."""

_ASSIGNMENT: Final = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_HEADER: Final = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_NEGATION: Final = "no_"
_MOST_PROBLEMS: Final = 100
"""Mistakes of one file that are told: looking for the nearest name of each takes time."""


@dataclass(frozen=True, slots=True)
class Given:
    """An option as it was given: its name, what was written, and where (a flag, or a file with a line)."""

    name: str
    raw: object
    where: str


@dataclass(slots=True)
class Source:
    """All that one source gives, with what is wrong with it and what is worth telling.

    ``unknown`` names the options that nobody has declared, each with its place among the ``problems``.
    """

    given: list[Given] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unknown: dict[str, Problem] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


# --- command line


def read_arguments(argv: Sequence[str], declared: Mapping[str, Declared]) -> Source:
    """Read a command line.

    A flag may be cut short as long as it stays clear, written with hyphens, and joined to its value by ``=``;
    ``--no_x`` switches ``--x`` off. Everything wrong is collected in the source's ``problems``.
    """
    source = Source()
    flags = _flags(declared)
    words = list(argv)
    last_switch: str | None = None
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            source.problems.append(_stray_words([word, *_take_values(words)], last_switch))
            continue
        last_switch = _read_flag(word, words, flags, declared, source)
    _tell_repeated(source)
    return source


def _flags(declared: Mapping[str, Declared]) -> dict[str, str]:
    """Option names by flag, without dashes."""
    flags = {name: name for name in (*declared, *CONFIG_FLAGS)}
    for name, item in declared.items():
        flags.update(dict.fromkeys(item.facts.flag_aliases, name))
    return flags


def _read_flag(
    word: str, words: list[str], flags: Mapping[str, str], declared: Mapping[str, Declared], source: Source
) -> str | None:
    """Read one flag and take its values from ``words``; the flag is returned when it is a switch."""
    flag, equals, joined = word.partition("=")
    text = flag[2:].replace("-", "_")
    name, value, candidates = _resolve(text, flags, declared)
    if name is None:
        _take_values(words)
        if text in FOREIGN_KEYS:
            source.foreign.append(text)
        else:
            problem = _unknown_flag(flag, candidates, flags)
            source.problems.append(problem)
            if not candidates:
                source.unknown[text] = problem
        return None
    if _is_switch(name, declared):
        if equals:
            remedy = f"Write {flag}, or --no_{name} to switch it off."
            source.problems.append(Problem(f"{flag} is a switch and takes no value", word, remedy))
        source.given.append(Given(name, value, flag))
        return flag
    many = name in declared and is_variadic(declared[name].type)
    values = [joined] if equals else _take_values(words, None if many else 1)
    if not values and not many:
        source.problems.append(Problem(f"{flag} needs a value", flag, f"Write {flag} VALUE, or leave {flag} out."))
    else:
        source.given.append(Given(name, values if many else values[0], flag))
    return None


def _resolve(
    text: str, flags: Mapping[str, str], declared: Mapping[str, Declared]
) -> tuple[str | None, bool, list[str]]:
    """The option that a flag means, the value it has as a switch, and what else it may have meant."""
    if text in flags:
        return flags[text], True, []
    positive = text.removeprefix(_NEGATION)
    if positive != text and positive in declared and is_switch(declared[positive]):
        return positive, False, []
    candidates = sorted(flag for flag in flags if flag.startswith(text)) if text else []
    if len({flags[flag] for flag in candidates}) == 1:
        return flags[candidates[0]], True, []
    return None, True, candidates


def _is_switch(name: str, declared: Mapping[str, Declared]) -> bool:
    return is_switch(declared[name]) if name in declared else name == "output_config"


def _take_values(words: list[str], most: int | None = None) -> list[str]:
    """Take from ``words`` what precedes the next flag, ``most`` values at the most."""
    count = 0
    while count < len(words) and not words[count].startswith("--") and count != most:
        count += 1
    values, words[:count] = words[:count], []
    return values


def _unknown_flag(flag: str, candidates: Sequence[str], flags: Iterable[str]) -> Problem:
    if candidates:
        listed = ", ".join(f"--{candidate}" for candidate in candidates)
        return Problem(f"{flag} could mean several options", flag, f"Write one of {listed}.")
    remedy = did_you_mean(flag[2:].replace("-", "_"), flags, "--") or "See --help for all options."
    return Problem(f"there is no option {flag}", flag, remedy)


def _stray_words(words: Sequence[str], switch: str | None) -> Problem:
    text = " ".join(words)
    if switch is not None:
        return Problem(f"{switch} is a switch and takes no value", f"{switch} {text}", f"Leave {text!r} out.")
    remedy = "A flag begins with two dashes." if text.startswith("-") else "Put values with spaces in quotes."
    return Problem(f"{text!r} belongs to no option", text, remedy)


def _tell_repeated(source: Source) -> None:
    """Tell of flags that are given twice with different values; the last one holds."""
    seen: dict[str, object] = {}
    for item in source.given:
        if item.name in seen and seen[item.name] != item.raw:
            source.notices.append(f"--{item.name} is given more than once; the last one holds")
        seen[item.name] = item.raw


# --- TOML file


def config_path(name: str) -> Path:
    """The configuration file that a name means: ``.toml`` is added where it is missing, ``~`` is the home folder."""
    return home_expanded(Path(name if name.endswith(".toml") else f"{name}.toml"))


def read_config(path: Path, declared: Mapping[str, Declared], ignored: Collection[str] = FOREIGN_KEYS) -> Source:
    """Read a TOML file; sections have no meaning and may be left out. Everything wrong is collected in ``problems``.

    Keys that are neither ``declared`` nor ``ignored`` are mistakes.
    """
    source = Source()
    text = _read_text(path, source)
    try:
        content = parse_toml(text)
    except DocumentError as error:
        what = str(error).removeprefix("it is ")
        source.problems.append(Problem(what, str(path), _toml_remedy(str(error), text)))
        return source
    lines = _lines(text)
    for section, name, raw in _flattened(content):
        line = lines.get((section, name))
        where = f"{path}, line {line}" if line else str(path)
        _read_key(name, raw, where, declared, source, ignored)
        if len(source.problems) >= _MOST_PROBLEMS:
            source.problems.append(Problem("further mistakes are not listed", str(path), "Mend these first."))
            break
    _keep_last(source)
    return source


def _read_text(path: Path, source: Source) -> str:
    try:
        return decode_text(path.read_bytes())
    except FileNotFoundError:
        source.problems.append(Problem(f"configuration file not found: {path}", "--config_file", near_remedy(path)))
    except DocumentError:
        source.problems.append(Problem("the file is not UTF-8 text", str(path), "Save it as UTF-8."))
    except OSError as error:
        remedy = "Give a file that can be read."
        source.problems.append(Problem(f"cannot read the configuration file: {error.strerror}", str(path), remedy))
    return ""


def _toml_remedy(message: str, text: str) -> str:
    if "'\\'" in message or "hex" in message:
        return "Put Windows paths in single quotes: 'C:\\images\\cat'."
    line = re.search(r"line (\d+)", message)
    if line and int(line[1]) <= len(text.splitlines()):
        return f"Correct this line: {text.splitlines()[int(line[1]) - 1].strip()}"
    return "Correct the file; text goes in quotes, lists in brackets."


def _flattened(content: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Section ("" for none), key and value of every entry, with sections opened one level."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from ((name, key, inner) for key, inner in value.items())
        else:
            yield "", name, value


def _lines(text: str) -> dict[tuple[str, str], int]:
    """Lines, counted from 1, of keys by section; keys inside inline tables have none."""
    found: dict[tuple[str, str], int] = {}
    section: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = [part.strip(" \t\"'") for part in header[1].split(".")]
            parts = ["", *section]
            found.setdefault((parts[-2], parts[-1]), number)
        elif assignment := _ASSIGNMENT.match(line):
            parts = ["", *section, *(part.strip(" \t\"'") for part in assignment[1].split("."))]
            found.setdefault((parts[-2], parts[-1]), number)
    return found


def _read_key(
    name: str, raw: object, where: str, declared: Mapping[str, Declared], source: Source, ignored: Collection[str]
) -> None:
    if name in declared:
        source.given.append(Given(name, raw, where))
    elif name in ignored:
        source.foreign.append(name)
    elif name in CONFIG_FLAGS:
        source.problems.append(Problem(f"{name} has no place in a configuration file", where, "Give it as a flag."))
    else:
        problem = _unknown_key(name, raw, where, declared)
        source.problems.append(problem)
        if not isinstance(raw, dict) and name != "datasets":
            source.unknown[name] = problem


def _unknown_key(name: str, raw: object, where: str, declared: Mapping[str, Declared]) -> Problem:
    if name == "datasets":
        remedy = "This describes a data set: give the file with --dataset_config instead."
        return Problem(f"there is no option {name}", where, remedy)
    if isinstance(raw, dict):
        return Problem(f"there is a table {name} inside a table", where, "Sections cannot be nested.")
    remedy = did_you_mean(name, declared) or "Remove it; see --help for all options."
    return Problem(f"there is no option {name}", where, remedy)


def _keep_last(source: Source) -> None:
    """Keep the last of the entries that sections repeat, and tell where they contradict each other."""
    last: dict[str, Given] = {}
    for item in source.given:
        earlier = last.get(item.name)
        if earlier is not None and earlier.raw != item.raw:
            source.notices.append(
                f"{item.name} is given twice, as {earlier.raw!r} ({earlier.where}) and {item.raw!r} ({item.where}); "
                "the last one holds"
            )
        last[item.name] = item
    source.given = list(last.values())
