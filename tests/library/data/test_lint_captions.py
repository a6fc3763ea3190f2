"""Captions that are cut, and files that belong to no image."""

from dataclasses import replace

import pytest

from library.data.lint_captions import lint_captions, lint_lengths, lint_orphans
from library.data.spec import CaptionRules
from tests.library.data.small_set import make_subset, write_images


class Words:
    """One token a word, ``limit`` of them."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, caption):
        return caption.split()

    def lost(self, caption):
        return " ".join(caption.split()[self.limit :])


def records_of(tmp_path, *captions):
    records = write_images(tmp_path, sizes=[(16, 16)] * len(captions))
    return [replace(record, caption=caption) for record, caption in zip(records, captions, strict=True)]


def test_the_lost_words_are_told(tmp_path):
    records = records_of(tmp_path, "one two three", "one two three four five")
    (finding,) = lint_lengths(make_subset(tmp_path), records, Words(3))
    assert finding.severity == "warning"
    assert "longer than 3 tokens, and its end is lost: 'four five'" in finding.what
    assert finding.where.endswith("1.png")
    assert "--max_token_length=150" in finding.remedy


def test_at_the_greatest_length_only_shortening_helps(tmp_path):
    (finding,) = lint_lengths(make_subset(tmp_path), records_of(tmp_path, "a " * 300), Words(225))
    assert finding.remedy == "Shorten the caption."


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (100, "Shorten the caption, or give --max_token_length=150."),
        (151, "Shorten the caption, or give --max_token_length=225."),
        (226, "Shorten the caption of 226 tokens, or give --max_token_length=225, the most there is, and lose fewer."),
    ],
)
def test_the_length_that_is_advised_is_enough(words, remedy, tmp_path):
    (finding,) = lint_lengths(make_subset(tmp_path), records_of(tmp_path, "a " * words), Words(75))
    assert finding.remedy == remedy


@pytest.mark.parametrize(("alike", "warned"), [(4, False), (5, True), (8, True)])
def test_captions_that_are_mostly_alike_are_told(alike, warned, tmp_path):
    records = records_of(tmp_path, *["a dog"] * alike, "a red dog", "a blue dog", "a green dog")
    findings = [finding for finding in lint_captions(make_subset(tmp_path), records) if "are the same" in finding.what]
    assert len(findings) == warned
    if warned:
        assert findings[0].what.startswith(f"{alike} of {alike + 3} captions")


@pytest.mark.parametrize("rules", [CaptionRules(caption_prefix="a photo"), CaptionRules(caption_suffix="on white")])
def test_what_is_put_around_a_caption_counts(rules, tmp_path):
    records = records_of(tmp_path, "one two three")
    assert list(lint_lengths(make_subset(tmp_path), records, Words(3))) == []
    assert len(list(lint_lengths(make_subset(tmp_path, captions=rules), records, Words(3)))) == 1


def test_every_line_counts(tmp_path):
    subset = make_subset(tmp_path, captions=CaptionRules(enable_wildcard=True))
    (finding,) = lint_lengths(subset, records_of(tmp_path, "one\none two three four"), Words(3))
    assert "'four'" in finding.what


def test_dropout_hides_nothing(tmp_path):
    subset = make_subset(tmp_path, captions=CaptionRules(caption_dropout_rate=1.0, caption_dropout_every_n_epochs=1))
    assert len(list(lint_lengths(subset, records_of(tmp_path, "one two three four"), Words(3)))) == 1


def test_many_long_captions_are_counted(tmp_path):
    findings = list(lint_lengths(make_subset(tmp_path), records_of(tmp_path, *["one two"] * 9), Words(1)))
    assert len(findings) == 6
    assert findings[-1].what.startswith("4 more captions in")


def test_a_face_crop_may_use_the_caption_of_its_image(tmp_path):
    write_images(tmp_path, sizes=[(16, 16)])
    (tmp_path / "0.png").rename(tmp_path / "anna_8_8_4_4.png")
    (tmp_path / "anna.txt").write_text("anna")
    subset = make_subset(tmp_path, caption_extension=".txt")
    assert list(lint_orphans(subset)) == []
    (tmp_path / "berta.txt").write_text("berta")
    (finding,) = lint_orphans(subset)
    assert "berta.txt" in finding.what


@pytest.mark.parametrize(
    ("caption", "prefix", "found"),
    [("a sks dog", "", False), ("a dog", "", True), ("a dog", "sks dog,", False), ("a SKS", "", False)],
)
def test_class_tokens_that_captions_lack(caption, prefix, found, tmp_path):
    rules = CaptionRules(caption_prefix=prefix)
    subset = make_subset(tmp_path, class_tokens="sks dog", captions=rules)
    findings = list(lint_captions(subset, records_of(tmp_path, caption)))
    assert bool(findings) == found
