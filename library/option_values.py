"""From what was written, on the command line or in a TOML file, to an option's value: one conversion for both."""

import difflib
import math
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

from library.documents import home_expanded, is_text, path_objection
from library.errors import Problem
from library.option_fields import Declared, OptionFacts

_TRUE: Final = ("true", "yes", "on", "1")
_FALSE: Final = ("false", "no", "off", "0")


def to_bool(raw: object) -> bool:
    """A switch: true or false, 0 or 1, or their names as text."""
    if isinstance(raw, bool):
        return raw
    text = str(raw).lower()
    if isinstance(raw, int | str) and text in _TRUE + _FALSE:
        return text in _TRUE
    raise ValueError("expects true or false")


def to_int(raw: object) -> int:
    """A whole number; a float without fraction counts as one, its text does not."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if isinstance(raw, str):
        try:
            return int(raw)
        except ValueError:
            pass
    raise ValueError("expects a whole number")


def to_float(raw: object) -> float:
    """A finite number."""
    try:
        value = math.nan if isinstance(raw, bool) or not isinstance(raw, int | float | str) else float(raw)
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("expects a number")
    return value


def to_text(raw: object) -> str:
    """Text; a number stands for its text (``output_name = 2024``)."""
    if not isinstance(raw, str | int | float) or isinstance(raw, bool):
        raise ValueError("expects text")
    text = str(raw)
    # Bytes of a command line that are no text come as halves of characters, which no file can hold.
    if not is_text(text):
        raise ValueError("expects text in UTF-8")
    return text


def to_path(raw: object) -> Path:
    """A path; ``~`` is the home folder, also where no shell has replaced it."""
    if isinstance(raw, str) and raw:
        if objection := path_objection(raw):
            raise ValueError(f"expects a path: {objection}")
        return home_expanded(Path(raw))
    raise ValueError("expects a path")


_CONVERSIONS: Final[dict[Any, Callable[[object], object]]] = {
    bool: to_bool,
    int: to_int,
    float: to_float,
    str: to_text,
    Path: to_path,
}


def _numbers(raw: object, convert: Callable[[object], Any]) -> list[Any]:
    """The elements of "a,b", of a list, or of a single number."""
    parts = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list | tuple) else [raw]
    return [convert(part.strip() if isinstance(part, str) else part) for part in parts]


def parse_size(raw: object) -> tuple[int, int]:
    """A size in pixels as (width, height), from 512, "512", "512,768" or [512, 768].

    Raises:
        ValueError: It is none of these.
    """
    try:
        values = _numbers(raw, to_int)
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise ValueError("expects 'side' or 'width,height' in pixels, such as 512 or 512,768")
    return values[0], values[-1]


def parse_range(raw: object) -> tuple[float, float]:
    """A range as (smallest, largest), from "2.0,4.0" or [2.0, 4.0].

    Raises:
        ValueError: It is neither, or the first is larger than the second.
    """
    try:
        values = _numbers(raw, to_float)
    except ValueError:
        values = []
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError("expects 'smallest,largest', such as 2.0,4.0")
    return values[0], values[1]


def parse_int_or_float(raw: object) -> int | float:
    """A number of steps (from 1), or a fraction of all steps: below 1, or a percentage such as "10%".

    Raises:
        ValueError: It is neither; text from 1 on must be a whole number.
    """
    try:
        if isinstance(raw, str) and raw.strip().endswith("%"):
            fraction = to_float(raw.strip()[:-1]) / 100
            if fraction < 1:
                return fraction
            raise ValueError
        value = to_float(raw)
        return to_int(raw) if value >= 1 or value == 0 and isinstance(raw, int) else value
    except ValueError:
        raise ValueError("expects a whole number of steps, a fraction below 1, or a percentage such as 10%") from None


def is_variadic(kind: Any) -> bool:
    """Whether a type is ``tuple[X, ...]``, perhaps with None: a flag with any number of values, a TOML array."""
    return any(get_origin(part) is tuple and get_args(part)[-1] is Ellipsis for part in (kind, *_members(kind)))


def is_switch(declared: Declared) -> bool:
    """Whether an option is a flag without a value."""
    return declared.type is bool


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; a type that is none is its own only member."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def convert(declared: Declared, raw: object) -> object:
    """The value of an option from its text or TOML value.

    Raises:
        ValueError: What was given does not fit; the message says what is expected or allowed.
    """
    members = _members(declared.type)
    if types.NoneType in members and _is_nothing(raw, members):
        return None
    if is_variadic(declared.type) and raw == "":
        return ()
    facts = declared.facts
    value = facts.parse(raw) if facts.parse else _by_type(members[0], raw)
    if facts.synonyms and value in facts.synonyms:
        return facts.synonyms[value]
    for element in value if isinstance(value, tuple) else (value,):
        _check(facts, element)
    return value


def _is_nothing(raw: object, members: Sequence[Any]) -> bool:
    """Whether a value stands for none: empty, or the ``false`` by which files switch off what is no switch."""
    return raw == "" or raw == [] or raw == () or (raw is False and bool not in members)


def _by_type(kind: Any, raw: object) -> object:
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        return tuple(_CONVERSIONS[element](part) for part in (raw if isinstance(raw, list | tuple) else (raw,)))
    return _CONVERSIONS[kind](raw)


def _check(facts: OptionFacts, value: Any) -> None:
    if facts.choices is not None and value not in facts.choices:
        allowed = ", ".join(str(choice) for choice in facts.choices)
        raise ValueError(f"allows {allowed}")
    if facts.minimum is not None and value < facts.minimum:
        raise ValueError(f"must be at least {facts.minimum:g}")
    if facts.maximum is not None and value > facts.maximum:
        raise ValueError(f"must be at most {facts.maximum:.10g}")
    if facts.above is not None and value <= facts.above:
        raise ValueError(f"must be greater than {facts.above:g}")
    wrong = facts.check(value) if facts.check else None
    if wrong:
        raise ValueError(wrong)


def text_pairs(values: Sequence[str]) -> dict[str, str]:
    """``key=value`` texts as a mapping to texts, split at the first equals sign; the last of equal keys holds."""
    parts = (text.partition("=") for text in values)
    return {key.strip(): value for key, _, value in parts}


def pair_problems(values: Sequence[str], flag: str) -> list[Problem]:
    """A problem for every text of an option that is not ``key=value``."""
    remedy = "Write key=value without spaces around the equals sign."
    return [
        Problem(f"{flag} expects key=value, not {text!r}", flag, remedy)
        for text in values
        if not text.partition("=")[1] or not text.partition("=")[0].strip()
    ]


def repeated_keys(values: Sequence[str], flag: str) -> list[str]:
    """One notice for each key that is given more than once."""
    keys = [text.partition("=")[0].strip() for text in values]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    return [f"{flag} gives {key} more than once; the last one holds" for key in repeated]


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A question that names the nearest of the ``known`` names, or "" when none is near."""
    spellings = {spelling.lower(): spelling for spelling in known}
    nearest = difflib.get_close_matches(name.lower(), list(spellings), 1)
    return f"Did you mean {prefix}{spellings[nearest[0]]}?" if nearest else ""


def choose_from(name: str, names: Collection[str], label: str) -> str:
    """A remedy for a wrong name: the nearest of ``names``, and all of them after ``label``."""
    everything = f"{label}: {', '.join(names) or 'none'}."
    return f"{did_you_mean(name, names)} {everything}".strip()


def near_names(path: Path) -> list[str]:
    """Names beside a path that does not exist which resemble it, nearest first."""
    try:
        names: Iterable[str] = [item.name for item in path.parent.iterdir()]
    except OSError:
        return []
    return difflib.get_close_matches(path.name, list(names), 3)


def near_remedy(path: Path) -> str:
    """What to do about a path that does not exist."""
    names = near_names(path)
    if names:
        return f"Did you mean {' or '.join(names)}?"
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either; check the path."
    return "Check the path."
