"""The options of both textual inversion scripts against the reference's list of flags."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from library.option_fields import declarations
from library.option_values import is_variadic
from library.options import declared_flags, parse_options
from library.textual_inversion_options import TextualInversionOptions, named

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flags_textual_inversion.json").read_text())
ROWS = [(script, row) for script, rows in GOLDEN.items() if script != "note" for row in rows]
DECLARED = declarations(TextualInversionOptions)


@pytest.mark.parametrize(("script", "row"), ROWS, ids=[f"{script}-{row['name']}" for script, row in ROWS])
def test_every_flag_of_the_reference_is_there_with_its_default(script: str, row: dict):
    assert row["name"] in declared_flags(TextualInversionOptions)
    declared = DECLARED.get(row["name"])
    if declared is None:
        assert row["name"] in {"config_file", "output_config"}
        return
    if is_variadic(declared.type) and row["default"] is None:
        assert declared.default in (None, ())
    else:
        assert declared.default == row["default"]
    known = {choice for choice in row["choices"] or () if choice is not None}
    if row["name"] == "save_model_as":
        # diffusers' own format is ours.
        known.add("bin")
    if row["name"] != "lr_scheduler":
        assert known <= set(declared.facts.choices or ())


def options(*arguments: str) -> TextualInversionOptions:
    return parse_options(TextualInversionOptions, ["--token_string=<zwx>", *arguments], prog="x", description="")


def test_results_are_named_after_the_word():
    assert named(options()).save.output_name == "zwx"
    assert named(options("--output_name=thing")).save.output_name == "thing"
    unusable = options()
    unusable = replace(unusable, embedding=replace(unusable.embedding, token_string="..."))
    assert named(unusable).save.output_name is None


def test_embeddings_stay_in_fp32():
    told: list[str] = []
    parse_options(
        TextualInversionOptions,
        ["--token_string=zwx", "--full_bf16", "--mixed_precision=bf16"],
        prog="x",
        description="",
        announce=told.append,
    )
    assert any("stay in 32 bits" in text for text in told)
