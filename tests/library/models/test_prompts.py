import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import library
from library.errors import UserError
from library.models.prompts import CaptionTokenizer, encode_preview_prompts, encode_tokens, restore_mean

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENIZER = Path(library.__file__).parent / "tokenizer"
PADDING = {"sd1": "<|endoftext|>", "sd2": "!"}
LAYERS = 3


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


@pytest.fixture(scope="module")
def tokenizers():
    return {
        family: CLIPTokenizer.from_pretrained(str(TOKENIZER), model_max_length=77, pad_token=padding)
        for family, padding in PADDING.items()
    }


@pytest.fixture(scope="module")
def text_encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, projection_dim=16
    )
    model = CLIPTextModel(config).eval()
    # Trained text encoders have a mean, which weights must not change; a fresh one has none.
    torch.nn.init.normal_(model.final_layer_norm.bias, mean=-0.1, std=0.1)
    return model


class PositionEncoder(torch.nn.Module):
    """Answers with a number for each position: 100 * chunk + index, chunks counted through the whole batch."""

    def forward(self, ids):
        class Output:
            last_hidden_state = (
                torch.arange(len(ids))[:, None, None] * 100.0 + torch.arange(ids.shape[1])[None, :, None]
            )

        return Output


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_tokens_equal_the_reference(tokenizers, family):
    cases = [case for case in golden("tokenization") if case["model"] == family]
    assert len(cases) > 30
    for case in cases:
        tokenizer = CaptionTokenizer(tokenizers[family], max_token_length=case["max_token_length"])
        caption = tokenizer(case["text"])
        assert caption.weights is None
        assert caption.ids.tolist() == case["ids"], (case["text"], case["max_token_length"])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_weighted_tokens_equal_the_reference(tokenizers, family):
    cases = [case for case in golden("tokenization_weighted") if case["model"] == family]
    assert len(cases) > 10
    for case in cases:
        tokenizer = CaptionTokenizer(tokenizers[family], max_token_length=case["max_token_length"], weighted=True)
        caption = tokenizer(case["text"])
        assert caption.ids.tolist() == case["ids"], case["text"]
        assert caption.weights.dtype == torch.float32
        torch.testing.assert_close(caption.weights, torch.tensor(case["weights"]), atol=1e-5, rtol=0)


def test_weighted_captions_without_weights_are_plain_captions(tokenizers):
    for case in golden("tokenization"):
        if set(case["text"]) & set("()[]\\:!"):
            continue
        plain, weighted = (
            CaptionTokenizer(tokenizers[case["model"]], max_token_length=case["max_token_length"], weighted=weighted)
            for weighted in (False, True)
        )
        assert torch.equal(plain(case["text"]).ids, weighted(case["text"]).ids)


def test_a_caption_tokenizer_survives_pickling(tokenizers):
    tokenizer = CaptionTokenizer(tokenizers["sd2"], max_token_length=150, weighted=True)
    copy = pickle.loads(pickle.dumps(tokenizer))
    for ours, theirs in zip(tokenizer("a (cat:1.3)"), copy("a (cat:1.3)"), strict=True):
        assert torch.equal(ours, theirs)


def test_long_captions_are_cut_without_a_word_on_the_console(tokenizers, caplog):
    for weighted in (False, True):
        CaptionTokenizer(tokenizers["sd1"], weighted=weighted)("cat " * 300)
    assert not caplog.records


def test_layout_equals_the_reference(tokenizers):
    for case in golden("hidden_state_layout"):
        tokenizer = CaptionTokenizer(tokenizers[case["model"]], max_token_length=case["max_token_length"])
        ids = tokenizer("cat " * case["text_len_words"]).ids
        hidden = encode_tokens(PositionEncoder(), ids[None], clip_skip=None)
        assert hidden.shape == (1, case["out_len"], 1)
        assert hidden.flatten().int().tolist() == case["source_of_each_position"]


def test_examples_of_a_batch_stay_apart():
    hidden = encode_tokens(PositionEncoder(), torch.zeros(3, 2, 77, dtype=torch.int64), clip_skip=None)
    assert hidden.shape == (3, 152, 1)
    assert hidden[:, 0, 0].tolist() == [0, 200, 400]
    assert hidden[:, -1, 0].tolist() == [176, 376, 576]


def test_weights_multiply_hidden_states_and_nothing_else():
    weights = torch.rand(2, 2, 77) + 0.5
    weights[:, :, [0, -1]] = 1.0
    ids = torch.zeros(2, 2, 77, dtype=torch.int64)
    plain = encode_tokens(PositionEncoder(), ids, clip_skip=None)
    weighted = encode_tokens(PositionEncoder(), ids, clip_skip=None, token_weights=weights)
    factors = torch.cat([weights[:, 0, :1], weights[:, 0, 1:-1], weights[:, 1, 1:]], dim=1)
    torch.testing.assert_close(weighted[..., 0], plain[..., 0] * factors)


def hidden_states_by_hand(text_encoder, ids):
    """Embeddings, then the output of every layer, by calling the layers one after another."""
    states = [text_encoder.embeddings(input_ids=ids)]
    mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
    for layer in text_encoder.encoder.layers:
        out = layer(states[-1], attention_mask=mask)
        states.append(out if isinstance(out, torch.Tensor) else out[0])
    return states


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_clip_skip_takes_a_layer_from_the_end_and_the_final_norm(tokenizers, text_encoder, clip_skip):
    ids = CaptionTokenizer(tokenizers["sd1"])("a photo of a cat").ids
    with torch.no_grad():
        expected = text_encoder.final_layer_norm(hidden_states_by_hand(text_encoder, ids)[-(clip_skip or 1)])
        hidden = encode_tokens(text_encoder, ids[None], clip_skip=clip_skip)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_clip_skip_works_with_a_nested_text_encoder(tokenizers, text_encoder):
    nested = CLIPTextModelWithProjection(text_encoder.config).eval()
    assert hasattr(nested, "text_model")
    nested.text_model.load_state_dict(text_encoder.state_dict())
    ids = CaptionTokenizer(tokenizers["sd1"])("a photo of a cat").ids[None]
    with torch.no_grad():
        for clip_skip in (None, 2):
            flat = encode_tokens(text_encoder, ids, clip_skip=clip_skip)
            torch.testing.assert_close(encode_tokens(nested, ids, clip_skip=clip_skip), flat)


@pytest.mark.parametrize("clip_skip", [0, -1, LAYERS + 1])
def test_a_clip_skip_that_does_not_fit_is_refused(text_encoder, clip_skip):
    ids = torch.zeros(1, 1, 77, dtype=torch.int64)
    with pytest.raises(UserError, match=f"clip_skip {clip_skip} does not fit: this text encoder has {LAYERS} layers"):
        encode_tokens(text_encoder, ids, clip_skip=clip_skip)


def test_gradients_reach_the_text_encoder(tokenizers, text_encoder):
    ids = CaptionTokenizer(tokenizers["sd1"], max_token_length=150)("a cat").ids[None]
    encode_tokens(text_encoder, ids, clip_skip=2).sum().backward()
    layers = text_encoder.encoder.layers
    assert layers[-2].mlp.fc1.weight.grad is not None
    assert layers[-1].mlp.fc1.weight.grad is None
    text_encoder.zero_grad()


@pytest.mark.parametrize(("family", "words", "chunks"), [("sd1", 10, 1), ("sd2", 76, 2), ("sd1", 200, 3)])
def test_a_preview_of_plain_prompts_encodes_whole_chunks(tokenizers, text_encoder, family, words, chunks):
    tokenizer, prompt = tokenizers[family], "cat " * words
    with torch.no_grad():
        context, uncond = encode_preview_prompts(tokenizer, text_encoder, prompt, "blurry", clip_skip=2)
        length = 75 * chunks
        for text, encoded in ((prompt, context), ("blurry", uncond)):
            ids = CaptionTokenizer(tokenizer, max_token_length=length)(text).ids
            states = text_encoder(ids, output_hidden_states=True).hidden_states
            expected = text_encoder.final_layer_norm(states[-2]).flatten(0, 1)[None]
            torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=1e-5)


def test_a_weighted_preview_keeps_each_prompts_mean(tokenizers, text_encoder):
    tokenizer = tokenizers["sd1"]
    with torch.no_grad():
        plain, plain_uncond = encode_preview_prompts(tokenizer, text_encoder, "a cat here", "bad", clip_skip=None)
        context, uncond = encode_preview_prompts(
            tokenizer, text_encoder, "a (cat:1.5) here", "(bad:0.5)", clip_skip=None
        )
    weights = torch.ones(1, 77, 1)
    weights[0, 2] = 1.5
    expected = plain * weights * (plain.mean() / (plain * weights).mean())
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=1e-5)
    assert context.mean().item() == pytest.approx(plain.mean().item(), abs=1e-5)
    assert uncond.mean().item() == pytest.approx(plain_uncond.mean().item(), abs=1e-5)
    assert not torch.allclose(uncond, plain_uncond)


def test_a_preview_prompt_that_is_too_long_is_cut_and_said_so(tokenizers, text_encoder, caplog):
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        long, _ = encode_preview_prompts(tokenizers["sd1"], text_encoder, "cat " * 300, "", clip_skip=None)
        full, _ = encode_preview_prompts(tokenizers["sd1"], text_encoder, "cat " * 225, "", clip_skip=None)
    assert torch.equal(long, full)
    assert [record.getMessage() for record in caplog.records] == [
        "a preview prompt has 300 tokens; only the first 225 count"
    ]


def test_a_mean_that_says_nothing_is_left_alone():
    original = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 3.0], [1.0, -1.0 + 1e-5]])
    weighted = torch.tensor([[2.0, 2.0], [0.0, 0.0], [1.0, -2.0], [2.0, -1.0]])
    assert restore_mean(weighted, original).tolist() == [[1.5, 1.5], *weighted[1:].tolist()]
