import pytest

from library.wording import label, named


@pytest.mark.parametrize(
    ("names", "said"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c"], "a, b and 1 more"), ("abcde", "a, b and 3 more")],
)
def test_what_is_not_named_is_counted(names, said):
    assert named(list(names), 2) == said


def test_what_holds_commas_can_be_parted_otherwise():
    assert named(["a, b", "c", "d"], 2, between="; ") == "a, b; c and 1 more"


def test_labels_have_only_letters_of_the_font():
    assert label("naïve café", 30) == "naive cafe"
    assert label("日本", 30) == "??"
    assert label("one\ntwo", 30) == "one two"


@pytest.mark.parametrize(
    ("text", "drawn"),
    [("x" * 30, "x" * 30), ("x" * 31, "x" * 27 + "..."), ("猫" * 99, "?" * 27 + "..."), ("ﬃ" * 11, "ffi" * 9 + "...")],
)
def test_labels_fit(text, drawn):
    assert label(text, 30) == drawn
    assert len(drawn) <= 30
