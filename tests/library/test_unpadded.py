"""Captions as long as they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from library.conditioning import ClipConditioning, UnpaddedConditioning
from library.data.dataset import Batch
from library.errors import UserError
from library.models.prompts import CaptionTokenizer
from library.models.tokenizer import load_tokenizer


class Encoder(nn.Module):
    """Tells which ids it was given, as hidden states of width 1."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=input_ids[..., None].float())


def conditioning(family: str) -> UnpaddedConditioning:
    tokenizer = load_tokenizer(family, vocabulary=49408)
    padded = ClipConditioning(
        tokenizer=tokenizer, encoder=Encoder(), tokenize=CaptionTokenizer(tokenizer, weighted=True), clip_skip=None
    )
    return UnpaddedConditioning(padded=padded, end_token=tokenizer.eos_token_id)


def batch(text: UnpaddedConditioning, *captions: str) -> Batch:
    ids, weights = zip(*(text.tokenize(caption) for caption in captions), strict=True)
    return Batch(
        epoch=1,
        step=0,
        examples=tuple(range(len(captions))),
        input_ids=torch.stack(ids),
        token_weights=torch.stack(weights),
        captions=captions,
        loss_weight=torch.ones(len(captions)),
    )


@pytest.mark.parametrize(("family", "exclamation_mark"), [("sd1", 256), ("sd2", 0)])
def test_padding_is_cut_off_and_weights_with_it(family: str, exclamation_mark: int) -> None:
    """SD2 fills captions up with exclamation marks; one inside a caption stays."""
    text = conditioning(family)
    (plain, weighted) = text.encode(batch(text, "a dog!", "a (dog:2.0)!"))[..., 0]
    assert plain.tolist() == [49406, 320, 1929, exclamation_mark, 49407]
    assert weighted.tolist() == [49406, 320, 2 * 1929, exclamation_mark, 49407]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_longest_caption_keeps_its_77_tokens_and_the_empty_one_two(family: str) -> None:
    text = conditioning(family)
    assert text.encode(batch(text, "dog " * 100)).shape == (1, 77, 1)
    assert text.encode(batch(text, "")).shape == (1, 2, 1)


def test_captions_of_different_lengths_are_refused() -> None:
    text = conditioning("sd1")
    with pytest.raises(UserError, match="captions of 1 to 2 tokens are in one batch") as refusal:
        text.encode(batch(text, "dog", "a dog"))
    assert "--gradient_accumulation_steps" in str(refusal.value)
