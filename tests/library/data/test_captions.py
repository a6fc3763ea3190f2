"""The caption pipeline against golden values, and what it must never do."""

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import caption_for
from library.data.spec import CaptionRules

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "caption_processing.json").read_text())["cases"]
# Replacing words of a caption belongs to textual inversion, not to the caption's own rules.
CASES = [case for case in GOLDEN if case["replacements"] is None]


def make(text, rules, seed=0, *, epoch=1, step=0, total_steps=100):
    return caption_for(text, rules, Random(seed), epoch=epoch, step=step, total_steps=total_steps)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['caption']!r}-{case['options']}-{case['epoch']}-{case['step']}"
)
def test_captions_are_the_golden_ones(case):
    rules = CaptionRules(**case["options"])
    place = {"epoch": case["epoch"], "step": case["step"], "total_steps": case["max_train_steps"]}
    assert [make(case["caption"], rules, seed, **place) for seed in case["random_seeds"]] == case["results"]


def test_the_golden_cases_are_not_filtered_away():
    assert len(CASES) >= 30


@pytest.mark.parametrize(("step", "count"), [(0, 2), (24, 2), (25, 3), (50, 4), (75, 5), (99, 5), (100, 6), (500, 6)])
def test_warm_up_grows_from_the_minimum_to_all(step, count):
    rules = CaptionRules(token_warmup_min=2, token_warmup_step=100)
    assert make("a, b, c, d, e, f", rules, step=step).split(", ") == ["a", "b", "c", "d", "e", "f"][:count]


def test_a_fraction_of_the_run_is_a_number_of_steps():
    fraction, steps = CaptionRules(token_warmup_step=0.25), CaptionRules(token_warmup_step=50)
    for step in range(0, 60, 5):
        text = "a, b, c, d, e, f"
        assert make(text, fraction, step=step, total_steps=200) == make(text, steps, step=step, total_steps=200)


def test_the_prefix_belongs_to_every_line():
    # Difference: in the reference only the first line gets the prefix, and only the last the suffix.
    rules = CaptionRules(enable_wildcard=True, caption_prefix="P,", caption_suffix="S")
    assert {make("one\ntwo", rules, seed) for seed in range(20)} == {"P, one S", "P, two S"}
    assert make("one\ntwo", CaptionRules(caption_suffix="S")) == "one S"


def test_captions_are_left_out_in_every_nth_epoch():
    rules = CaptionRules(caption_dropout_every_n_epochs=3)
    assert [make("a", rules, epoch=epoch) for epoch in range(1, 7)] == ["a", "a", "", "a", "a", ""]


tags = st.lists(st.text("abcdef ", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=8)


@given(tags=tags, keep=st.integers(0, 9), seed=st.integers(0, 1000))
def test_shuffling_keeps_every_tag_and_the_first_in_place(tags, keep, seed):
    tags = [tag.strip() for tag in tags]
    rules = CaptionRules(shuffle_caption=True, keep_tokens=keep)
    shuffled = make(",".join(tags), rules, seed).split(", ")
    assert sorted(shuffled) == sorted(tags)
    assert shuffled[:keep] == tags[:keep]


@given(tags=tags, keep=st.integers(0, 9), rate=st.floats(0, 1), seed=st.integers(0, 1000))
def test_tag_dropout_keeps_order_and_kept_tags(tags, keep, rate, seed):
    numbered = [f"{number}{tag.strip()}" for number, tag in enumerate(tags)]
    rules = CaptionRules(caption_tag_dropout_rate=rate, keep_tokens=keep)
    left = [tag for tag in make(", ".join(numbered), rules, seed).split(", ") if tag]
    assert left == sorted(left)
    assert set(numbered[:keep]) <= set(left) <= set(numbered)


@given(seed=st.integers(0, 1000), rate=st.floats(0, 1))
def test_the_same_state_gives_the_same_caption(seed, rate):
    rules = CaptionRules(
        shuffle_caption=True, caption_dropout_rate=rate, caption_tag_dropout_rate=rate, enable_wildcard=True
    )
    text = "a, {b|c|d}, e\nf, g"
    assert make(text, rules, seed) == make(text, rules, seed)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("{a}", "a"),
        ("{}", "{}"),
        ("{{a}}", "{a}"),
        ("{}}", "{}"),
        ("a{", "a{"),
        ("}{a}", "}a"),
        ("{a{b}", "a{b"),
        ("{}b}", "{}b}"),
    ],
)
def test_unusual_choices(caption, expected):
    assert (
        caption_for(caption, CaptionRules(enable_wildcard=True), Random(0), epoch=1, step=0, total_steps=1) == expected
    )
