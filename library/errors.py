"""Mistakes that are the user's to mend, and how a script shows them.

A script raises :class:`UserError` for everything wrong with its input and wraps its ``main`` in :func:`run_script`,
which prints one block (what, where, what to do) and ends with exit code 2. Everything else that escapes is our own
defect and keeps its traceback.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from library.documents import printable
from library.streams import outlive_the_screen

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: What is wrong, with the value as it was given.
        where: The flag, the file and line, or the image concerned.
        remedy: What the user can do about it.
    """

    what: str
    where: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        # Names of files are in it, which may hold anything.
        lines = [printable(self.what)]
        if self.where:
            lines.append(f"  where:  {printable(self.where)}")
        if self.remedy:
            lines.append(f"  remedy: {printable(self.remedy)}")
        return "\n".join(lines)


class UserError(Exception):
    """Input that cannot be used; carries every problem found, not just the first."""

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.problems: tuple[Problem, ...] = (Problem(what, where, remedy),)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> "UserError":
        """One error that reports all of ``problems`` (at least one)."""
        found = tuple(problems)
        assert found, "an error needs a problem"
        error = cls(found[0].what)
        error.problems = found
        error.args = ("; ".join(problem.what for problem in found),)
        return error

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        numbered = (f"{number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems:\n" + "\n".join(numbered)


def first_line(error: Exception) -> str:
    """What ``error`` says, in one line; libraries add advice for their makers below."""
    return next(iter(str(error).splitlines()), "").strip() or type(error).__name__


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise one :class:`UserError` with all ``problems``, or do nothing when there are none."""
    if problems:
        raise UserError.of(problems)


def problems_of(checks: Iterable[Callable[[], object]]) -> list[Problem]:
    """What ``checks`` refuse with a :class:`UserError`, all together."""
    found: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found += error.problems
    return found


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a script's ``main(argv)`` and exit with its code, showing a :class:`UserError` as one block (exit code 2).

    The traceback of a user error goes to the log at DEBUG level, never to the screen.
    """
    outlive_the_screen()
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        logging.getLogger(__name__).debug("user error", exc_info=True)
        print(f"\nerror: {error}\n", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        print("\nstopped", file=sys.stderr)
        # Other signals than Ctrl-C's come with the code that a shell expects.
        code = error.args[0] if error.args else EXIT_INTERRUPTED
    sys.exit(code)
