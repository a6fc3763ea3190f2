"""Values of ``key=value`` lists (``--optimizer_args``, ``--lr_scheduler_args``): read them, refuse unknown names."""

import ast
from collections.abc import Collection, Sequence

from library.errors import Problem
from library.options import choose_from, text_pairs


def read_arguments(texts: Sequence[str], *, flag: str) -> tuple[dict[str, object], list[Problem]]:
    """Read ``key=value`` texts whose values are Python literals: ``weight_decay=0.1``, ``betas=.9,.99``.

    Returns:
        The values by name, and what could not be read.
    """
    values: dict[str, object] = {}
    problems: list[Problem] = []
    for name, text in text_pairs(texts).items():
        try:
            values[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            problems.append(Problem(f"{name}={text}: the value cannot be read", where=flag, remedy=_literal_hint(text)))
    return values, problems


def _literal_hint(text: str) -> str:
    if " " in text.strip() and "=" in text:
        return 'Give each argument in quotes of its own: "weight_decay=0.1" "eps=1e-8".'
    if text.strip().lower() in ("true", "false", "none"):
        return f"Write {text.strip().capitalize()}, with a capital."
    return "Write a number, True, False, None, numbers such as 0.9,0.99, or a text in quotes."


def unknown_names(given: Collection[str], accepted: Collection[str], *, flag: str, owner: str) -> list[Problem]:
    """A problem for every name in ``given`` that ``owner`` does not accept, with the nearest and all accepted names."""
    return [
        Problem(f"{owner} has no argument {name!r}", where=flag, remedy=choose_from(name, accepted, f"{owner} accepts"))
        for name in given
        if name not in accepted
    ]
