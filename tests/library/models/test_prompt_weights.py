import json
from pathlib import Path

import pytest

from library.models.prompt_weights import parse_prompt_weights

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "prompt_weights.json").read_text())

DIFFERENCES = {
    # The reference raises ValueError and ends the run; a weight that is no number is text here, as "(a: 1.2)" is.
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"])
def test_equals_the_reference(case):
    expected = DIFFERENCES.get(case["text"]) or [tuple(piece) for piece in case["result"]]
    assert parse_prompt_weights(case["text"]) == [(text, pytest.approx(weight)) for text, weight in expected]


def test_every_difference_is_a_case_that_fails_in_the_reference():
    assert {case["text"] for case in GOLDEN["cases"] if "error" in case} == set(DIFFERENCES)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1.0)]),
        ("()", [("", 1.0)]),
        ("(a:1.2)(b:1.2)", [("ab", 1.2)]),
        ("a:1.5)", [("a:1.5)", 1.0)]),
        ("[a:1.5)", [("a:1.5)", 1 / 1.1)]),
        (r"\(a:1.5\)", [("(a:1.5)", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
    ],
)
def test_unusual_prompts(prompt, expected):
    assert parse_prompt_weights(prompt) == [(text, pytest.approx(weight)) for text, weight in expected]
