"""The option groups together against the reference's list of flags."""

import json
import typing
from pathlib import Path

import pytest

from library.option_fields import declarations
from library.option_values import convert, is_switch, is_variadic
from library.options import declared_flags
from train_network import Options

GOLDEN = Path(__file__).parents[1] / "golden"
REFERENCE = {row["name"]: row for row in json.loads((GOLDEN / "flags.json").read_text())["train_network.py"]}
DECLARED = declarations(Options)

MORE_CHOICES = {"lr_scheduler"}  # a free text in the reference, whose wrong values fail after the models are loaded


OURS = {"dry_run", "validate_dataset"}


def test_the_set_of_flags():
    assert declared_flags(Options) == {*REFERENCE, *OURS}


@pytest.mark.parametrize("name", sorted({*DECLARED} - OURS))
def test_default_type_and_choices(name):
    declared, expected = DECLARED[name], REFERENCE[name]
    default = expected["default"]
    if is_variadic(declared.type) and default is None:
        assert declared.default in (None, ())
    else:
        assert declared.default == default
    assert is_switch(declared) == (expected["type"] == "flag")
    assert is_variadic(declared.type) == expected["many"]
    if name not in MORE_CHOICES:
        choices = {choice for choice in expected["choices"] or () if choice is not None}
        assert set(declared.facts.choices or ()) == choices
    if expected["type"] in ("int", "float"):
        assert expected["type"] in str(declared.type)


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_default_fits_its_own_checks(name):
    declared = DECLARED[name]
    if declared.default is None:
        assert type(None) in typing.get_args(declared.type)
    elif not isinstance(declared.default, tuple):
        assert convert(declared, declared.default) == declared.default


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_help_is_a_sentence(name):
    text = DECLARED[name].facts.help
    assert text[0].isupper() or text.startswith("--") or text.startswith("'")
    assert len(text) < 250
