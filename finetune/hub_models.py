"""Models of the transformers library: a local folder, or a hub id whose files are fetched into the hub's own cache."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from library.errors import Problem
from library.models.hub import fetch_files

_GENERAL: Final = frozenset(
    (
        "added_tokens.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
)
NO_CODE: Final = {"local_files_only": True, "attn_implementation": "eager"}
"""How models are loaded: a configuration may otherwise name a hub repository whose code would be fetched and run."""

_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files of weights, best first."""


_NOTHING: Final = Problem("this hub model has not the files that are needed", remedy="Check the hub id.")


def model_folder(source: str, *, flag: str) -> Path:
    """The local folder of a model.

    Args:
        source: A folder, or a hub id (``owner/name``).
        flag: The option that names it.

    Raises:
        UserError: There is no such folder, and no such model that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    return fetch(source, model_files, flag=flag)


def model_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that its model needs, weights in one format; empty where there is none."""
    known = set(names)
    weights = next((name for name in _WEIGHTS if name in known), None)
    if weights is None or "config.json" not in known:
        return []
    parts = {name for name in known if name.endswith(".safetensors")} if weights.endswith(".index.json") else set()
    return sorted((known & _GENERAL) | {weights} | parts)


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that its tokenizer needs."""
    return sorted(set(names) & (_GENERAL - {"preprocessor_config.json", "processor_config.json", "merges.txt"}))


def fetch(repository: str, choose: Callable[[Iterable[str]], list[str]], *, flag: str) -> Path:
    """The local folder with the files that ``choose`` picks; see :func:`library.models.hub.fetch_files`."""
    return fetch_files(repository, choose, flag=flag, unusable=lambda _: _NOTHING)
