"""A new word in captions, and what is refused before anything heavy is imported."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from library.data.records import ImageRecord
from library.data.spec import BucketRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec
from library.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from library.models.embedding_options import EmbeddingOptions
from library.new_words import NewWord, Rewording, check_captions, check_word, file_name, word_notices

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/ti_templates.json").read_text())
WORD = NewWord(names=("zwx", "zwx1", "zwx2"))


def record(caption: str, *, is_reg: bool = False, number: int = 0) -> ImageRecord:
    return ImageRecord(
        folder=Path(),
        name=f"{number:02d}.png",
        size=(64, 64),
        caption=caption,
        has_caption_file=True,
        dataset=0,
        subset=0,
        is_reg=is_reg,
        repeats=1,
    )


def spec(**rules: object) -> DataSpec:
    subset = SubsetSpec(image_dir=Path("images"), name="images", where="d.toml:9", captions=CaptionRules(**rules))
    dataset = DatasetSpec(resolution=(64, 64), batch_size=1, buckets=BucketRules(), subsets=(subset,))
    return DataSpec(datasets=(dataset,), where="d.toml")


def test_the_names_of_the_vectors():
    assert NewWord.of(EmbeddingOptions(token_string="zwx", num_vectors_per_token=3)).names == WORD.names
    assert NewWord.of(EmbeddingOptions(token_string="zwx")).names == ("zwx",)


@pytest.mark.parametrize(
    ("caption", "written"),
    [
        ("a zwx dog", "a zwx zwx1 zwx2 dog"),
        ("zwx, ZWX", "zwx zwx1 zwx2, zwx zwx1 zwx2"),
        ("zwx's dog", "zwx zwx1 zwx2's dog"),
        # Inside other words it is not the word.
        ("azwx zwxy zwx1", "azwx zwxy zwx1"),
        # Written out already.
        ("a zwx zwx1 zwx2 dog", "a zwx zwx1 zwx2 dog"),
        ("(zwx:1.2) [zwx]", "(zwx zwx1 zwx2:1.2) [zwx zwx1 zwx2]"),
        ("no such word", "no such word"),
    ],
)
def test_a_word_of_several_vectors_is_written_out(caption: str, written: str):
    assert WORD.written_out(caption) == written


def test_a_word_with_signs_is_written_out():
    word = NewWord(names=("<a.b>", "<a.b>1"))
    assert word.written_out("one <a.b> and <aXb>") == "one <a.b> <a.b>1 and <aXb>"


def test_one_vector_changes_no_caption():
    assert NewWord(names=("zwx",)).written_out("a zwx dog") == "a zwx dog"


@pytest.mark.parametrize(("kind", "templates"), [("object", OBJECT_TEMPLATES), ("style", STYLE_TEMPLATES)])
def test_templates_are_those_of_the_paper(kind: str, templates: tuple[str, ...]):
    assert list(templates) == GOLDEN[kind]


def test_templates_take_the_place_of_captions():
    options = EmbeddingOptions(token_string="zwx", num_vectors_per_token=2, use_style_template=True)
    reword = Rewording.of(options)
    seen = Counter(reword("a dog", record("a dog"), Random(number)) for number in range(1000))
    assert set(seen) == {sentence.format("zwx zwx1") for sentence in GOLDEN["style"]}
    assert min(seen.values()) > 20


def test_the_object_templates_win():
    options = EmbeddingOptions(token_string="zwx", use_style_template=True, use_object_template=True)
    assert Rewording.of(options).templates == OBJECT_TEMPLATES
    assert "--use_object_template is used, --use_style_template is not" in options.notices()


def test_regularisation_images_keep_their_captions():
    reword = Rewording.of(EmbeddingOptions(token_string="zwx", use_object_template=True))
    assert reword("a dog", record("a dog", is_reg=True), Random(0)) == "a dog"


@pytest.mark.parametrize("token", [None, "", "two words", "(zwx)", "a,b", "a|b", "a\\b"])
def test_a_word_that_cannot_be_one_is_refused(token: str | None):
    problems = EmbeddingOptions(token_string=token).problems()
    assert len(problems) == 1
    assert problems[0].where == "--token_string"


def test_a_word_of_the_vocabulary_is_refused():
    for token in ("cat", "CAT", "pt"):
        problems = check_word(EmbeddingOptions(token_string=token), layered=False)
        assert "vocabulary already" in problems[0].what
    assert not check_word(EmbeddingOptions(token_string="zwx", num_vectors_per_token=3), layered=False)


def test_an_init_word_without_a_known_piece_is_refused():
    assert EmbeddingOptions(token_string="zwx", init_word=" ").problems()


@pytest.mark.parametrize(
    ("init_word", "vectors", "told"),
    [
        ("dog", 1, None),
        ("dog", 2, "reused in turn"),
        ("golden retriever dog", 2, "the first of them are used"),
        ("golden retriever", 2, None),
    ],
)
def test_a_number_of_init_words_that_differs_is_told(init_word: str, vectors: int, told: str | None):
    options = EmbeddingOptions(token_string="zwx", init_word=init_word, num_vectors_per_token=vectors)
    notices = list(word_notices(options))
    assert (told is None and not notices) or (len(notices) == 1 and str(told) in notices[0])


def test_a_known_word_is_told():
    assert "from now on it stands for" in next(word_notices(EmbeddingOptions(token_string="sks")))


def test_captions_without_the_word_are_refused():
    found = check_captions(Rewording(word=WORD), spec(), [record("a dog"), record("zwx", is_reg=True)])
    assert [finding.severity for finding in found] == ["error"]
    assert "no caption contains the new word 'zwx'" in found[0].what
    assert "00.png" in found[0].where
    assert "caption_prefix" in found[0].remedy


def test_captions_that_hold_the_word_are_taken():
    reword = Rewording(word=WORD)
    assert check_captions(reword, spec(), [record("a ZWX dog")]) == []
    assert check_captions(reword, spec(caption_prefix="zwx,"), [record("a dog")]) == []
    assert check_captions(reword, spec(enable_wildcard=True), [record("a dog\na {zwx|dog}")]) == []
    assert check_captions(Rewording(word=WORD, templates=("a {}",)), spec(), [record("a dog")]) == []


def test_some_captions_without_the_word_are_told():
    told = check_captions(Rewording(word=WORD), spec(), [record("zwx"), record("a dog", number=1)])
    assert [finding.severity for finding in told] == ["warning"]
    assert told[0].what == "1 of 2 images have captions without 'zwx', which teach it nothing: 01.png"


@pytest.mark.parametrize(("word", "name"), [("zwx", "zwx"), ("<zwx>", "zwx"), ("a/b:c", "abc"), ("...", None)])
def test_a_file_name_has_no_sign_that_some_system_refuses(word: str, name: str | None):
    assert file_name(word) == name


def test_checks_import_nothing_heavy():
    code = (
        "import sys; from library.new_words import check_word, word_notices\n"
        "from library.models.embedding_options import EmbeddingOptions\n"
        "options = EmbeddingOptions(token_string='zwx', init_word='dog')\n"
        "check_word(options, layered=True), list(word_notices(options))\n"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
