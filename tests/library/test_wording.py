import pytest

from library.wording import named


@pytest.mark.parametrize(
    ("names", "said"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c"], "a, b and 1 more"), ("abcde", "a, b and 3 more")],
)
def test_what_is_not_named_is_counted(names, said):
    assert named(list(names), 2) == said


def test_what_holds_commas_can_be_parted_otherwise():
    assert named(["a, b", "c", "d"], 2, between="; ") == "a, b; c and 1 more"
