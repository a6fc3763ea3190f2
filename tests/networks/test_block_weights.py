"""Blocks and learning-rate weights, against values recorded from the reference."""

import json
from pathlib import Path

import pytest

from library.errors import UserError
from networks.block_weights import BLOCK_COUNT, block_index, parse_lr_weights
from networks.lora_settings import read_settings

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "lora_block_index.json").read_text())["index"]
LR_CASES = json.loads((GOLDEN / "lora_block_lr.json").read_text())["cases"]

# The reference ends these with a TypeError; here they mean what they say, or are refused with a message.
REFERENCE_BUGS = {
    "1,1,1,1,1,1,1,1,1,1,1,1,1,1": (1.0,) * BLOCK_COUNT,
    "1": (1.0,) * BLOCK_COUNT,
    "foo": None,
}


def weights_of(arguments):
    sides = [arguments.get(f"{side}_lr_weight") for side in ("down", "mid", "up")]
    return parse_lr_weights(*sides, zero_threshold=float(arguments.get("block_lr_zero_threshold", 0)))


def test_block_of_every_module():
    assert len(INDEX) > 200
    assert {name: block_index(name) for name in INDEX} == INDEX


@pytest.mark.parametrize(
    "name",
    ["lora_unet_down_blocks_4_resnets_0_conv1", "lora_unet_down_blocks_0_resnets_2_conv1", "lora_te_text_model_x"],
)
def test_a_module_outside_the_25_blocks_is_refused(name):
    with pytest.raises(UserError, match="none of the 25 blocks"):
        block_index(name)


@pytest.mark.parametrize("case", [c for c in LR_CASES if "error" not in c], ids=lambda c: str(c["args"]))
def test_lr_weights(case):
    weights = weights_of(case["args"])
    if case["weights"] is None:
        assert weights is None
        return
    assert weights == pytest.approx(case["weights"], abs=1e-12)
    settings = read_settings(4, 1.0, None, case["args"])
    assert settings.blocks is not None
    assert [rank.dim for rank in settings.blocks] == case["block_dims_after"]


@pytest.mark.parametrize("case", [c for c in LR_CASES if "error" in c], ids=lambda c: str(c["args"]))
def test_listed_differences_of_lr_weights(case):
    (text,) = case["args"].values()
    expected = REFERENCE_BUGS[text]
    if expected is None:
        with pytest.raises(UserError, match="neither a list of numbers nor a known shape"):
            weights_of(case["args"])
    else:
        assert weights_of(case["args"]) == expected


def test_too_few_values_are_filled_with_one_and_announced(caplog):
    weights = parse_lr_weights(None, None, "0.5,,0.25")
    assert weights[13:] == (0.5, 0.0, 0.25, *[1.0] * 9)
    assert "up_lr_weight has 3 values instead of 12" in caplog.text


def test_one_number_stands_for_a_whole_side():
    assert parse_lr_weights("0.5", None, None) == (0.5,) * 12 + (1.0,) * 13


@pytest.mark.parametrize("text", ["nan", "1,inf", "sine+x"])
def test_values_that_are_no_weights(text):
    with pytest.raises(UserError):
        parse_lr_weights(None, None, text)
