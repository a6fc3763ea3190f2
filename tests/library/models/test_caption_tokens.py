import json
from pathlib import Path

import pytest

from library.models.caption_tokens import CaptionTokens, joined

GOLDEN = Path(__file__).parents[2] / "golden"
PLAIN = CaptionTokens(limit=75)
END = 49407


def words_of(ids):
    """The word ids of golden chunks, without begin, end and padding."""
    return without_padding([number for chunk in ids for number in chunk[1:-1]])


def without_padding(ids):
    """Without the end tokens behind the last word: padding is one of them."""
    return ids[: next((at for at in range(len(ids), 0, -1) if ids[at - 1] != END), 0)]


def cases(name):
    return [case for case in json.loads((GOLDEN / f"{name}.json").read_text())["cases"] if case["model"] == "sd1"]


@pytest.mark.parametrize("case", cases("tokenization"), ids=lambda case: case["text"][:20])
def test_tokens_are_those_of_the_model(case):
    tokens = CaptionTokens(limit=case["max_token_length"] or 75)
    wanted = words_of(case["ids"])
    assert without_padding([token.id for token in tokens(case["text"])][: tokens.limit]) == wanted


@pytest.mark.parametrize("case", cases("tokenization_weighted"), ids=lambda case: case["text"][:20])
def test_weighted_tokens_are_those_of_the_model(case):
    tokens = CaptionTokens(limit=case["max_token_length"] or 75, weighted=True)
    assert without_padding([token.id for token in tokens(case["text"])][: tokens.limit]) == words_of(case["ids"])


def test_the_text_of_the_tokens_is_the_caption():
    text = "Photo of a sks-dog, caffè 東京 \U0001f600 it's 42"
    assert joined(PLAIN(text)) == text


def test_lost_words_are_what_stands_behind_the_limit():
    words = [f"word{number % 10}" for number in range(40)]
    # "word0" is two tokens, so the limit falls into the 38th word.
    assert PLAIN.lost(" ".join(words)) == "7 word8 word9"
    assert PLAIN.lost("a dog") == ""


def test_a_weight_is_told():
    tokens = CaptionTokens.of(max_token_length=None, weighted=True)("a (red:1.3) cat")
    assert [(token.text, token.weight) for token in tokens] == [("a", 1.0), ("red", 1.3), ("cat", 1.0)]
