from dataclasses import dataclass

import pytest

from library.errors import UserError
from library.option_positions import missing_positions, name_positions, split_positions
from library.options import option, parse_options


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options."""

    folder: str | None = option(None, help="A folder.")
    out: str | None = option(None, help="A file.")
    count: int = option(1, help="A number.", flag_aliases=("number",))
    quiet: bool = option(False, help="A switch.")
    words: tuple[str, ...] = option((), help="Words.")


@pytest.mark.parametrize(
    ("line", "words", "rest"),
    [
        ("a b", ["a", "b"], []),
        ("--quiet a --count 2 b", ["a", "b"], ["--quiet", "--count", "2"]),
        ("--count=2 a b", ["a", "b"], ["--count=2"]),
        ("a --number 2 b", ["a", "b"], ["--number", "2"]),
        ("--cou 2 a", ["a"], ["--cou", "2"]),
        ("--no_quiet a", ["a"], ["--no_quiet"]),
        ("a b --words c d", ["a", "b"], ["--words", "c", "d"]),
        ("a --config_file c.toml b", ["a", "b"], ["--config_file", "c.toml"]),
        ("a --output_config b", ["a", "b"], ["--output_config"]),
        ("a --nonsense b", ["a"], ["--nonsense", "b"]),
        ("a -h", ["a"], ["-h"]),
        ("../train data.json", ["../train", "data.json"], []),
    ],
)
def test_words_without_a_flag_are_told_from_values(line: str, words: list[str], rest: list[str]) -> None:
    assert split_positions(Options, line.split()) == (words, rest)


def test_positions_become_options() -> None:
    words, rest = split_positions(Options, ["my folder", "--count", "3", "out=1.json"])
    given = [*name_positions(words, ["folder", "out"]), *rest]
    options = parse_options(Options, given, prog="tool", description="")
    assert (options.folder, options.out, options.count) == ("my folder", "out=1.json", 3)


def test_too_many_words_are_refused_and_missing_ones_named() -> None:
    with pytest.raises(UserError, match="3 words without a flag, and 2"):
        name_positions(["a", "b", "c"], ["folder", "out"])
    assert [problem.what for problem in missing_positions({"folder": "a", "out": None})] == ["out is missing"]
