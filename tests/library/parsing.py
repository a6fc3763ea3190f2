"""Reading command lines and files into every option group, for tests."""

import pytest

from library.errors import UserError
from library.options import parse_options
from train_network import Options


def parse(*argv, notices=None):
    """The options; notices are appended to the list."""
    return parse_options(
        Options,
        [str(word) for word in argv],
        prog="train_network.py",
        description="Train a network.",
        announce=(lambda text: None) if notices is None else notices.append,
    )


def problems_of(*argv):
    """The problems of a command line that cannot be used."""
    with pytest.raises(UserError) as error:
        parse(*argv)
    return error.value.problems


def config(folder, text):
    """A configuration file that holds the text."""
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path
