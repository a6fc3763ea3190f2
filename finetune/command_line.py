"""The command line of a tool that works on a folder of images. Imports nothing heavy."""

from collections.abc import Sequence
from typing import TypeVar

from library.option_positions import name_positions, split_positions
from library.script_options import HasConsole
from library.script_options import read_options as read_named_options

T = TypeVar("T", bound=HasConsole)

FOLDER = "train_data_dir"
"""The option that is given by its place, without a flag; a flag or a line of a file does as well."""


def read_options(kind: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """The options of a tool, from ``argv`` and its ``--config_file``; sets the log up as they say.

    Args:
        kind: The tool's options class; it has a field ``console``.
        argv: Command line without the program's name.
        prog: The program's name.
        description: What the tool does.

    Raises:
        UserError: Something is wrong; all problems together.
    """
    words, rest = split_positions(kind, argv)
    named = [*name_positions(words, [FOLDER]), *rest]
    return read_named_options(kind, named, prog=f"{prog} {FOLDER}", description=description)
