"""Nucleus sampling whose draws belong to the image, not to the batch (Holtzman et al. 2020, arXiv:1904.09751)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TOP_K: Final = 50
"""Tokens that are drawn from at the most; the transformers library's own limit, which BLIP's captions always had."""


class KeyedNucleus:
    """A logits processor that draws the next token of each row and leaves no other: greedy search then takes it.

    The library's own sampling draws for all rows from one global generator, so that a caption would depend on what
    else is in its batch.
    """

    def __init__(self, generators: "Sequence[torch.Generator]", *, top_p: float) -> None:
        """Draw for row i from ``generators[i]``, among the likeliest tokens that hold ``top_p`` of the probability."""
        self._generators = generators
        self._top_p = top_p

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        """``scores`` (batch, vocabulary) with minus infinity everywhere but at the tokens that were drawn."""
        import torch

        logits, tokens = scores.topk(min(_TOP_K, scores.shape[-1]))
        draws = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in self._generators])
        place = nucleus_places(logits.double().cpu().softmax(-1), draws, top_p=self._top_p)
        chosen = tokens.gather(-1, place.to(tokens.device)[:, None])
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def nucleus_places(probabilities: "Tensor", draws: "Tensor", *, top_p: float) -> "Tensor":
    """Where in the nucleus each draw falls.

    Args:
        probabilities: (batch, tokens), the largest first.
        draws: (batch,), uniform in 0..1.
        top_p: The nucleus is the fewest tokens that together have at least this probability; never none.

    Returns:
        (batch,) places in ``probabilities``.
    """
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.where(before < top_p, 0.0)
    ends = kept.cumsum(-1)
    places = (ends <= draws[:, None] * ends[:, -1:]).sum(-1)
    # A draw of nearly 1 must not fall behind the last token by rounding.
    return places.minimum((kept > 0).sum(-1) - 1)
