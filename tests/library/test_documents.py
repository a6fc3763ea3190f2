import json

import pytest

from library.documents import (
    MOST_LEVELS,
    DocumentError,
    is_text,
    parse_json,
    parse_toml,
    path_objection,
    printable,
    printable_lines,
    read_text,
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1), "nested too deeply"),
        ('{"a": ' * 900 + "1" + "}" * 900, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        (str(2**64), "beyond 64 bits"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        (r'["\ud800"]', r"no file can hold: '\ud800'"),
        (r'{"\u0000": 1}', r"no file can hold: '\x00'"),
        ("{", "no JSON (Expecting property name enclosed in double quotes, line 1)"),
    ],
)
def test_json_that_cannot_be_used(text, what):
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("a." * 100_000 + "a = 1", "nested too deeply"),
        ("[" + "a." * 100_000 + "a]", "nested too deeply"),
        ("x = {" + "'a' . " * 100_000 + "a = 1}", "nested too deeply"),
        ("a = " + "9" * 5000, "too many digits"),
        ("a = 0x" + "f" * 100, "beyond 64 bits"),
        (r'a = "\u0000"', "no file can hold"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_toml_that_cannot_be_used(text, what):
    with pytest.raises(DocumentError) as caught:
        parse_toml(text)
    assert what in str(caught.value)


def test_what_is_sound_is_read_as_the_standard_library_reads_it():
    content = {"a": [1, 2.5, -(2**63), {"b": None}], "é": "\u2028", "d": [[[[[]]]]]}
    assert parse_json(json.dumps(content)) == content
    assert parse_toml("a.b.c = 1\nd = '1.2.3.4.5'\ne = [1.5, 2.5]")["a"] == {"b": {"c": 1}}


def test_many_dots_outside_of_keys_are_no_depth():
    text = "dots = '" + ".a" * 1000 + "'\nnumbers = [" + "1.5, " * 1000 + "]"
    assert len(parse_toml(text)["numbers"]) == 1000


def test_text_that_is_not_utf_8(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(DocumentError, match="byte 2"):
        read_text(tmp_path / "a")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(tmp_path / "a") == "a"


def test_nothing_that_steers_a_terminal_is_shown():
    assert printable("a\nb\x1b[31m\x9b\u202e\ud800\0") == r"a\nb\x1b[31m\x9b\u202e\ud800\x00"
    assert printable_lines("a\n\tb\x1b[2J\r") == "a\n\tb\\x1b[2J\\r"
    for plain in ("Grüße, 東京 👩‍👩‍👧", "a b", "נ"):
        assert printable(plain) == plain


def test_is_text():
    assert is_text("é\n👩")
    assert not is_text("\0")
    assert not is_text("a\udfff")


def test_paths_that_no_system_has():
    assert path_objection("a/" * 3000)
    assert path_objection("x" * 256)
    assert path_objection("a\0")
    assert path_objection("é" * 127) is None
    assert path_objection("../" + "x" * 255) is None
