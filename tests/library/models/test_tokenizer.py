"""The tokenizer that ships, against recorded token ids."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from library.errors import UserError
from library.models.tokenizer import load_tokenizer, read_tokenizer
from tests.tiny import TOKENIZER

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenization.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["max_token_length"] is None]

tokenizer = cache(load_tokenizer)


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_captions_become_the_recorded_ids(model):
    cases = [case for case in CASES if case["model"] == model]
    assert len(cases) >= 10
    for case in cases:
        ids = tokenizer(model)(case["text"], padding="max_length", truncation=True)["input_ids"]
        assert [ids] == case["ids"], case["text"]


def test_the_families_pad_differently():
    assert tokenizer("sd1").pad_token_id == tokenizer("sd1").eos_token_id == 49407
    assert tokenizer("sd2").pad_token_id == 0
    assert tokenizer("sd1").model_max_length == tokenizer("sd2").model_max_length == 77


def test_a_models_own_tokens_are_used_where_its_text_encoder_has_them(tmp_path):
    own = load_tokenizer("sd1")
    own.add_tokens(["<shs>"])
    own.save_pretrained(tmp_path)

    loaded = load_tokenizer("sd1", vocabulary=49409, folder=tmp_path)

    assert loaded("<shs>")["input_ids"] == [49406, 49408, 49407]
    assert loaded.model_max_length == 77
    assert load_tokenizer("sd1", vocabulary=49408, folder=tmp_path)("<shs>")["input_ids"] != [49406, 49408, 49407]


def test_the_old_two_files_are_a_tokenizer_and_pad_as_the_family_does(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(TOKENIZER / name, tmp_path / name)
    loaded = read_tokenizer(tmp_path, "sd2")
    assert loaded("a cat", padding="max_length")["input_ids"][:6] == [49406, 320, 2368, 49407, 0, 0]


def test_a_folder_without_tokenizer_is_reported(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        read_tokenizer(tmp_path, "sd1")


def test_a_tokenizer_larger_than_the_text_encoder_is_reported(tmp_path):
    own = load_tokenizer("sd1")
    own.add_tokens(["<a>", "<b>"])
    own.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="49410 tokens"):
        load_tokenizer("sd1", vocabulary=49409, folder=tmp_path)
