"""How every training script begins: its options are read, the log is set up, and what is worth knowing is told."""

import logging
from collections.abc import Sequence
from typing import Protocol, TypeVar

from library.options import parse_options
from library.runtime import set_up_logging
from library.runtime_options import ConsoleOptions

log = logging.getLogger(__name__)


class HasConsole(Protocol):
    """Options that say where log lines go."""

    @property
    def console(self) -> ConsoleOptions: ...  # noqa: D102


T = TypeVar("T", bound=HasConsole)


def read_options(kind: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """The options of a script, from ``argv`` and its ``--config_file``; sets the log up as they say.

    Args:
        kind: The script's options class.
        argv: Command line without the program's name.
        prog: The program's name, for ``--help``.
        description: What the script does, for ``--help``.

    Raises:
        UserError: Something is wrong; all problems together.
    """
    notices: list[str] = []
    options = parse_options(kind, argv, prog=prog, description=description, announce=notices.append)
    set_up_logging(options.console)
    for notice in notices:
        log.warning(notice)
    return options
