"""New tokens: only their rows are trained, and they are found as whole words."""

import pickle

import pytest
import torch

from library.errors import UserError
from library.models.caption_tokens import CaptionTokens
from library.models.new_tokens import add_tokens, extend, random_rows, rows_of_words, token_table
from library.models.tokenizer import load_tokenizer
from tests.tiny import tiny_parts

NAMES = ("zwx", "zwx1")


@pytest.fixture
def text_encoder():
    return tiny_parts("sd1").text_encoder


def test_tokens_are_whole_words():
    tokenizer = load_tokenizer("sd1")
    first = add_tokens(tokenizer, NAMES)
    assert first == 49408

    def ids(text: str) -> list[int]:
        return [number for number in tokenizer(text, add_special_tokens=False)["input_ids"] if number >= first]

    assert ids("a zwx zwx1, ZWX (zwx1) zwx's") == [49408, 49409, 49408, 49409, 49408]
    assert ids("azwx zwxy zwx2 zwx_1") == []


@pytest.mark.parametrize("caption", ["a zwx zwx1, ZWX dog's", "masks of zwx", "zwx1zwx zwx"])
def test_the_pictures_of_the_data_set_show_the_same_tokens(caption: str):
    tokenizer = load_tokenizer("sd1")
    add_tokens(tokenizer, NAMES)
    shown = CaptionTokens.of(max_token_length=None, weighted=False, new_words=NAMES)(caption)
    assert [token.id for token in shown] == tokenizer(caption, add_special_tokens=False)["input_ids"]


def test_a_known_piece_is_refused():
    with pytest.raises(UserError, match="knows cat already"):
        add_tokens(load_tokenizer("sd2"), ("cat",))


def test_the_tokenizer_can_be_sent_to_a_worker():
    tokenizer = load_tokenizer("sd1")
    first = add_tokens(tokenizer, NAMES)
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent("zwx", add_special_tokens=False)["input_ids"] == [first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_rows_get_gradients_and_change(text_encoder, dtype: torch.dtype):
    text_encoder.to(dtype)
    table = token_table(text_encoder)
    before = table.weight.clone()
    rows = extend(text_encoder, torch.randn(2, 64), first=49408)
    assert rows.weight.dtype == torch.float32
    assert [name for name, value in text_encoder.named_parameters() if value.requires_grad] == [
        "embeddings.token_embedding.rows.weight"
    ]
    optimizer = torch.optim.AdamW(rows.parameters(), lr=0.1, weight_decay=0.5)
    started = rows.weight.detach().clone()
    ids = torch.tensor([[49406, 320, 49408, 49409, 49407]])
    text_encoder(ids).last_hidden_state.float().square().sum().backward()
    optimizer.step()
    assert not torch.equal(rows.weight, started)
    assert torch.equal(table.weight, before)


def test_known_ids_have_their_embeddings_and_new_ids_the_rows(text_encoder):
    table = token_table(text_encoder).weight.clone()
    rows = torch.randn(2, 64)
    extend(text_encoder, rows, first=49408)
    found = token_table(text_encoder)(torch.tensor([[5, 49408, 49407, 49409]]))
    assert torch.equal(found, torch.stack([table[5], rows[0], table[49407], rows[1]])[None])


def test_the_encoder_is_that_of_a_table_made_longer(text_encoder):
    """transformers' own way to add tokens gives the same hidden states."""
    other = tiny_parts("sd1").text_encoder
    rows = torch.randn(2, 64)
    other.resize_token_embeddings(49410, mean_resizing=False)
    with torch.no_grad():
        token_table(other).weight[49408:] = rows
    extend(text_encoder, rows, first=49408)
    ids = torch.tensor([[49406, 320, 49408, 49409, 49407]])
    with torch.no_grad():
        assert torch.equal(text_encoder(ids).last_hidden_state, other(ids).last_hidden_state)


def test_known_words_are_taken_in_turn(text_encoder):
    table = token_table(text_encoder).weight
    assert torch.equal(rows_of_words(text_encoder, [7, 9], 5), table[[7, 9, 7, 9, 7]])


def test_random_rows_are_keyed_and_like_the_table(text_encoder):
    rows = random_rows(text_encoder, 1000, seed=3)
    table = token_table(text_encoder).weight
    assert torch.equal(rows, random_rows(text_encoder, 1000, seed=3))
    assert not torch.equal(rows, random_rows(text_encoder, 1000, seed=4))
    assert torch.allclose(rows.std(), table.std(), rtol=0.05)
    assert not torch.equal(rows[0], rows[1])
