"""Labels, wording, rules and input of the tagger."""

import json

import numpy as np
import pytest
from PIL import Image

from finetune.tagger_labels import Category, Label, Wording, expanded, parse_replacements, read_csv, read_mapping
from finetune.tagger_model import preprocess
from finetune.tagger_rules import Chooser, Place, Rules
from library.data.images import decode
from library.errors import UserError
from tests.finetune.runs import ROOT

GOLDEN = json.loads((ROOT / "tests/golden/wd14_preprocess.json").read_text())

LABELS = [
    *(Label(name, Category.RATING) for name in ("general", "sensitive")),
    *(Label(name, Category.GENERAL) for name in ("1girl", "long_hair", "^_^", "red_sky")),
    *(Label(name, Category.CHARACTER) for name in ("miku_(vocaloid)", "saber_(casual)_(fate)")),
    *(Label(name, Category.QUALITY) for name in ("best_quality", "worst_quality")),
    Label("fate_(series)", Category.COPYRIGHT),
]
ALL = np.ones(len(LABELS))
THRESHOLDS = {category: 0.35 for category in Category}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['mode']}-{case['size']}")
def test_the_input_is_that_of_the_reference(case, tmp_path):
    width, height = case["size"]
    channels = {"RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(case["mode"], ())
    content = np.random.default_rng(5).integers(0, 256, (height, width, *channels), np.uint8)
    image = Image.fromarray(content)
    (image.convert("P") if case["mode"] == "P" else image).save(tmp_path / "image.png")
    pixels = preprocess(decode(tmp_path / "image.png").rgb, 448).astype(np.float32)
    assert list(pixels.shape) == case["out_shape"]
    assert pixels[0, 0].tolist() == case["corner"]
    assert pixels[224, 224].tolist() == case["center"]
    np.testing.assert_allclose(pixels.mean((0, 1)), case["mean"], atol=1e-3)


def choose(rules=None, wording=None, probabilities=ALL):
    wording = Wording(replacements={}, **(wording or {})) if not isinstance(wording, Wording) else wording
    return Chooser(LABELS, wording, Rules(thresholds=THRESHOLDS, **(rules or {}))).choose(probabilities)


GENERAL = ["1girl", "long_hair", "^_^", "red_sky"]
CHARACTERS = ["miku_(vocaloid)", "saber_(casual)_(fate)"]


def test_general_tags_then_characters_then_others():
    assert choose() == [*GENERAL, *CHARACTERS, "fate_(series)"]


def test_characters_first_are_turned_round():
    assert choose({"characters_first": True}) == [*CHARACTERS[::-1], *GENERAL, "fate_(series)"]


def test_a_tag_is_taken_from_its_threshold_on():
    probabilities = np.array([0, 0, 0.35, 0.3499, 0.5, 0.1, 0.85, 0.84, 0, 0, 0])
    thresholds = THRESHOLDS | {Category.CHARACTER: 0.85}
    chooser = Chooser(LABELS, Wording(replacements={}), Rules(thresholds=thresholds))
    assert chooser.choose(probabilities) == ["1girl", "^_^", "miku_(vocaloid)"]


def test_the_likeliest_rating_and_quality_are_given_whatever_their_probability():
    probabilities = np.zeros(len(LABELS))
    probabilities[[1, 8]] = 0.01
    assert choose(probabilities=probabilities) == []
    assert choose({"rating": Place.FIRST, "quality": Place.LAST}, probabilities=probabilities) == [
        "sensitive",
        "best_quality",
    ]
    probabilities[2] = 1
    both_first = {"rating": Place.FIRST, "quality": Place.FIRST}
    assert choose(both_first, probabilities=probabilities) == ["sensitive", "best_quality", "1girl"]
    assert choose({"rating": Place.LAST}, probabilities=probabilities) == ["1girl", "sensitive"]


def test_undesired_tags_are_left_out_as_they_are_written():
    rules = {"undesired": frozenset(["long hair", "1girl", "general"]), "rating": Place.FIRST}
    tags = choose(rules, {"removes_underscores": True})
    assert tags[:2] == ["^_^", "red sky"]
    assert "long_hair" in choose({"undesired": frozenset(["long hair"])})


def test_tags_that_come_first_end_up_in_reverse():
    first = ("red_sky", "1girl", "absent")
    assert choose({"first": first, "rating": Place.FIRST})[:3] == ["1girl", "red_sky", "general"]


def test_expanded_characters_are_two_tags_and_none_is_given_twice():
    assert expanded("miku_(vocaloid)") == ("miku", "vocaloid")
    assert expanded("saber_(casual)_(fate)") == ("saber_(casual)", "fate")
    assert [expanded(name) for name in ("miku", "(vocaloid)", "_(a)", "a)")] == [None] * 4
    wording = {"expands_characters": True, "removes_underscores": True}
    tags = choose({"undesired": frozenset(["vocaloid"])}, wording)
    assert tags[4:] == ["miku", "saber (casual)", "fate", "fate (series)"]
    assert "fate_(series)" in choose(wording={"expands_characters": True})


def test_underscores_stay_in_faces():
    assert choose(wording={"removes_underscores": True})[:4] == ["1girl", "long hair", "^_^", "red sky"]


def test_replacements_come_after_underscores():
    pairs = parse_replacements("long hair,hair;red_sky,never;1girl,a girl")
    tags = choose(wording=Wording(removes_underscores=True, replacements=pairs))
    assert tags[:4] == ["a girl", "hair", "^_^", "red sky"]


def test_replacements_are_pairs():
    assert parse_replacements("a,b; c , d") == {"a": "b", "c": "d"}
    assert parse_replacements(r"\,_\;,comma;x,\;\)") == {",_;": "comma", "x": r";\)"}
    assert parse_replacements("") == {}
    for text in ("a", "a,b,c", "a,", ",b"):
        with pytest.raises(ValueError, match="pairs"):
            parse_replacements(text)


def test_labels_of_both_kinds_of_files(tmp_path):
    table = tmp_path / "selected_tags.csv"
    table.write_text('tag_id,name,category,count\n1,general,9,5\n2,"a,b",0,4\n3,c_(d),4,1\n', encoding="utf-8")
    expected = [Label("general", Category.RATING), Label("a,b", Category.GENERAL), Label("c_(d)", Category.CHARACTER)]
    assert read_csv(table) == expected
    mapping = tmp_path / "tag_mapping.json"
    entries = {"1": {"tag": "a,b", "category": "General"}, "0": {"tag": "general", "category": "Rating"}}
    mapping.write_text(json.dumps(entries | {"2": {"tag": "c_(d)", "category": "Character"}}))
    assert read_mapping(mapping) == expected
    tables = {
        "idx_to_tag": {"0": "general", "1": "a,b", "2": "c_(d)"},
        "tag_to_category": {"a,b": "General", "c_(d)": "Character", "general": "Rating"},
    }
    mapping.write_text(json.dumps(tables))
    assert read_mapping(mapping) == expected


@pytest.mark.parametrize("content", ["", "name\n1\n", "name,category\nx,77\n", "\xff\xfe"])
def test_broken_tables_are_refused(tmp_path, content):
    (tmp_path / "tags.csv").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="cannot read the tags of the tagger"):
        read_csv(tmp_path / "tags.csv")


@pytest.mark.parametrize("content", ["", "[]", "[1]", '{"0": 1}', '{"1": {"tag": "a", "category": "General"}}', "{"])
def test_broken_mappings_are_refused(tmp_path, content):
    (tmp_path / "tags.json").write_text(content)
    with pytest.raises(UserError, match="cannot read the tags of the tagger"):
        read_mapping(tmp_path / "tags.json")
