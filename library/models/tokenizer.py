"""The CLIP tokenizer: from the files that come with the program, or from the user's own."""

from pathlib import Path
from typing import Any, Final

from library.errors import UserError
from library.models.variant import Family

MAX_LENGTH: Final = 77
VOCABULARY: Final = 49408
_CACHE_NAMES: Final[dict[Family, str]] = {
    "sd1": "openai_clip-vit-large-patch14",
    "sd2": "stabilityai_stable-diffusion-2",
}
_SHIPPED: Final = Path(__file__).parents[1] / "tokenizer"
_END: Final = "<|endoftext|>"
_PAD: Final[dict[Family, str]] = {"sd1": _END, "sd2": "!"}
_FILES: Final = ("tokenizer.json", "vocab.json")
_OTHERS: Final = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES: Final = (*_FILES, *_OTHERS)
"""The files that a CLIP tokenizer may consist of."""


def load_tokenizer(family: Family, *, vocabulary: int = VOCABULARY, folder: Path | None = None) -> Any:
    """A ``CLIPTokenizer`` of 77 tokens that pads as the family does: SD1 with the end token, SD2 with ``!`` (id 0).

    Args:
        family: SD1 or SD2.
        vocabulary: Rows of the text encoder's token table. Only where it differs from CLIP's does the model have a
            vocabulary of its own, as after adding tokens.
        folder: The model's own tokenizer folder, used in that case.

    Raises:
        UserError: A vocabulary of its own, and no tokenizer that fits it.
    """
    if vocabulary == VOCABULARY or folder is None:
        return _shipped(family)
    tokenizer = read_tokenizer(folder, family)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the text encoder knows {vocabulary}",
            where=str(folder),
            remedy="The model folder is inconsistent: copy or download it again.",
        )
    return tokenizer


def read_tokenizer(folder: Path, family: Family) -> Any:
    """The tokenizer in ``folder``, padding as the family does where its vocabulary allows.

    Raises:
        UserError: The folder has no tokenizer, or one that cannot be read.
    """
    from transformers import CLIPTokenizer

    if not has_tokenizer(folder):
        raise UserError(
            "no tokenizer in this folder",
            where=str(folder),
            remedy="It needs vocab.json and merges.txt, or tokenizer.json.",
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=MAX_LENGTH, local_files_only=True)
    except Exception as error:  # whatever its files make the library stumble over
        raise UserError(
            f"the tokenizer cannot be read: {error}", where=str(folder), remedy="Copy or download the model again."
        ) from error
    if _PAD[family] in tokenizer.get_vocab():
        tokenizer.pad_token = _PAD[family]
    return tokenizer


def tokenizer_folders(given: Path, family: Family) -> tuple[Path, Path]:
    """Where ``--tokenizer_cache_dir`` may hold a tokenizer: the folder itself, or the family's folder in it."""
    return given, given / _CACHE_NAMES[family]


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer's files."""
    return any((folder / name).is_file() for name in _FILES)


def _shipped(family: Family) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=str(_SHIPPED / "vocab.json"),
        merges=str(_SHIPPED / "merges.txt"),
        model_max_length=MAX_LENGTH,
        pad_token=_PAD[family],
    )
