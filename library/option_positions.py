"""Words of a command line that stand for options by their place alone: ``tool.py FOLDER OUT.json --flag``."""

from collections.abc import Mapping, Sequence

from library.errors import Problem, UserError
from library.option_fields import Declared, declarations
from library.option_sources import CONFIG_FLAGS
from library.option_values import is_switch, is_variadic


def split_positions(kind: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of ``argv`` that belong to no flag, in order, and all the others.

    Args:
        kind: The tool's options class. A flag for one value takes the next word, one for many all up to the next flag.
        argv: Command line without the program's name.
    """
    flags = _values_by_flag(declarations(kind))
    words: list[str] = []
    rest: list[str] = []
    taken = 0
    for word in argv:
        if word.startswith("--"):
            taken = _values_of(word, flags)
            rest.append(word)
        elif taken or word == "-h":
            taken = max(taken - 1, 0)
            rest.append(word)
        else:
            words.append(word)
    return words, rest


def name_positions(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """``words`` as flags, the first for the first of ``names``; fewer words than names leave the last ones out.

    Raises:
        UserError: There are more words than names.
    """
    if len(words) > len(names):
        raise UserError(
            f"there are {len(words)} words without a flag, and {len(names)} are expected",
            where=" ".join(words),
            remedy=f"Write {' '.join(names)} in this order; values with spaces go in quotes, flags begin with --.",
        )
    return [f"--{name}={word}" for name, word in zip(names, words, strict=False)]


def missing_positions(values: Mapping[str, object]) -> list[Problem]:
    """A problem for each of ``values``, by name, that was not given."""
    order = " ".join(values)
    return [
        Problem(f"{name} is missing", name, f"Write these words first, in this order: {order}.")
        for name, value in values.items()
        if value is None
    ]


_ALL = 1 << 30
"""More words than a command line has."""


def _values_by_flag(declared: Mapping[str, Declared]) -> dict[str, int]:
    """How many words each flag takes at the most."""
    flags = {name: int(name != "output_config") for name in CONFIG_FLAGS}
    for name, item in declared.items():
        count = 0 if is_switch(item) else _ALL if is_variadic(item.type) else 1
        flags.update(dict.fromkeys((name, *item.facts.flag_aliases), count))
        if is_switch(item):
            flags[f"no_{name}"] = 0
    return flags


def _values_of(word: str, flags: Mapping[str, int]) -> int:
    """How many of the words behind the flag ``word`` belong to it; the flag may be cut short."""
    text, equals, _ = word[2:].replace("-", "_").partition("=")
    if equals:
        return 0
    if text in flags:
        return flags[text]
    counts = {count for flag, count in flags.items() if flag.startswith(text)}
    # An unknown flag is reported with all that follows it.
    return counts.pop() if len(counts) == 1 else _ALL
