"""Captions by GIT (Wang et al. 2022, arXiv:2205.14100), through transformers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from finetune.blip import loaded
from finetune.hub_models import NO_CODE, model_folder
from library.data.images import decode

if TYPE_CHECKING:
    import torch

FLAG: Final = "--model_id"

# What models read off an image: words in double or in single quotes, or a single word.
_DOUBLE: Final = '" ?[^"]*"'
_SINGLE: Final = "' ?(?:i'm)?[^']*'"
_PLACE: Final = r"(?: ?(?:is )?(?:on|in) (?:(?:the|her|their|him) )?\w+)"
_VISIBLE_TEXT: Final = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?:has|with|and) the (?:words?|letters?|name) (?:{_DOUBLE}|\w+){_PLACE}?",
        rf"(?:with a sign )?that says ?(?:{_DOUBLE}|\w+)(?: ?on it)?",
        rf"(?:with a sign )?that says ?(?:{_SINGLE}|\w+)(?: ?on it)?",
        r"with the number \d+ on (?:it|\w+ \w+)",
        r'with the words "',
        r"word \w+ on it",
        r"that says the word \w+ on it",
        r"that says ?'the word \"(?: on it)?",
    )
)


def without_visible_text(caption: str) -> str:
    """``caption`` without phrases about words, letters, names and numbers that are seen in the image."""
    for pattern in _VISIBLE_TEXT:
        caption = pattern.sub("", caption)
    return caption


@dataclass(frozen=True, kw_only=True, slots=True)
class Git:
    """A captioning model.

    Attributes:
        model: ``GitForCausalLM``.
        processor: Its image processor and tokenizer.
        device: Where it is.
    """

    model: Any
    processor: Any
    device: "torch.device"

    def read(self, path: Path) -> Any:
        """The image ``path`` as the model takes it: a tensor (3, height, width)."""
        image = Image.fromarray(decode(path).rgb)
        return self.processor(images=image, return_tensors="pt").pixel_values[0]

    def caption(self, images: Sequence[Any], *, max_length: int, removes_words: bool) -> list[str]:
        """A caption for each of ``images``, by greedy search.

        Args:
            images: What :meth:`read` gives.
            max_length: Longest caption in tokens.
            removes_words: Leave out phrases about visible text.
        """
        import torch

        pixels = torch.stack(list(images)).to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(pixel_values=pixels, max_length=max_length, do_sample=False, num_beams=1)
        captions = [str(text) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
        return [(without_visible_text(text) if removes_words else text).strip() for text in captions]


def load_git(source: str, device: "torch.device") -> Git:
    """A GIT captioning model, in float32.

    Args:
        source: A folder or a hub id.
        device: Where to put it.

    Raises:
        UserError: It cannot be found, fetched or read, or is something else.
    """
    import transformers
    from transformers import AutoProcessor, GitForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = model_folder(source, flag=FLAG)
    model, processor = loaded(
        lambda: (
            GitForCausalLM.from_pretrained(folder, dtype="float32", **NO_CODE),
            AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        ),
        what="GIT model",
        where=f"{FLAG} {source}",
    )
    return Git(model=model.to(device).eval(), processor=processor, device=device)
