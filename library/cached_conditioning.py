"""Captions encoded once, before training, where the text encoder is not trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from library.conditioning import ClipConditioning, TextConditioning
from library.data.dataset import Batch
from library.data.fixed_captions import fixed_captions
from library.data.setup import TrainingData
from library.models.options import PromptOptions
from library.models.prompts import TokenizedCaption, encode_tokens
from library.models.stable_diffusion import StableDiffusion
from library.runtime import Runtime


class CachedConditioning:
    """Captions encoded once, each by itself, so that no result depends on its neighbours in a batch.

    The text encoder stays on the CPU, and comes to the device for previews alone.

    Args:
        inner: How text is encoded.
        encoded: Each caption's encoding (75 * chunks + 2, text width), on the CPU.
        runtime: Device and precision.
    """

    encoder = None

    def __init__(self, inner: ClipConditioning, encoded: Mapping[str, Tensor], runtime: Runtime) -> None:
        self._inner = inner
        self._encoded = encoded
        self._runtime = runtime

    @classmethod
    def fill(cls, inner: ClipConditioning, captions: Iterable[str], runtime: Runtime) -> "CachedConditioning":
        """Encode every caption of ``captions``; each process does so for itself."""
        shown = tqdm(list(captions), desc="caching captions", disable=not runtime.is_main)
        return cls(inner, cls(inner, {}, runtime)._encoded_now(shown), runtime)

    def _encoded_now(self, captions: Iterable[str]) -> dict[str, Tensor]:
        with self._at_hand(), torch.no_grad(), self._runtime.accelerator.autocast():
            return {caption: self._encode(caption).cpu() for caption in captions}

    def _encode(self, caption: str) -> Tensor:
        ids, weights = (
            None if part is None else part[None].to(self._runtime.device) for part in self.tokenize(caption)
        )
        assert ids is not None, "every caption has tokens"
        return encode_tokens(self._inner.encoder, ids, clip_skip=self._inner.clip_skip, token_weights=weights)[0]

    @property
    def tokenize(self) -> Callable[[str], TokenizedCaption]:
        """Turns a caption into tokens."""
        return self._inner.tokenize

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch``: (B, 75 * chunks + 2, text width); those of held-out images when first met."""
        missing = [caption for caption in batch.captions if caption not in self._encoded]
        if missing:
            self._encoded = {**self._encoded, **self._encoded_now(missing)}
        return torch.stack([self._encoded[caption] for caption in batch.captions]).to(self._runtime.device)

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """A preview's prompt and negative prompt: (1, 77 * chunks, text width) each."""
        with self._at_hand():
            return self._inner.encode_prompts(prompt, negative)

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """The text encoder on the device inside the block."""
        self._inner.encoder.to(self._runtime.device)
        try:
            yield
        finally:
            self._inner.encoder.to("cpu")


def text_conditioning(
    model: StableDiffusion, options: PromptOptions, data: TrainingData, runtime: Runtime, *, cached: bool
) -> TextConditioning:
    """Text through the model's own text encoder, with the captions of ``data`` encoded at once if ``cached``."""
    live = ClipConditioning.of(model, options)
    return CachedConditioning.fill(live, fixed_captions(data), runtime) if cached else live
