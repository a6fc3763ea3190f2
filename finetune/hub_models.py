"""Models of the transformers library: a local folder, or a hub id whose files are fetched into the hub's own cache."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from library.errors import UserError, first_line

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
    """The local folder with the files that ``choose`` picks from a repository of the hub.

    Raises:
        UserError: No such model, no access, no connection, or nothing to pick.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    where = f"{flag} {repository}"
    try:
        wanted = choose(file.rfilename for file in HfApi().model_info(repository).siblings or ())
        if not wanted:
            raise UserError("this hub model has not the files that are needed", where=where, remedy="Check the hub id.")
        # All files lie in one folder, that of the repository's newest state.
        return [Path(hf_hub_download(repository, name)) for name in wanted][0].parent
    except GatedRepoError as error:
        raise UserError(
            f"access to {repository} has to be granted first",
            where=where,
            remedy="Accept its terms on its page at the hub, then log in with: hf auth login",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"no folder {repository}, and no such model on the hub (or it is private)",
            where=where,
            remedy="Check the path or the hub id; for a private model log in with: hf auth login",
        ) from error
    except (OSError, HTTPError) as error:
        return _from_cache(repository, where, error)


def _from_cache(repository: str, where: str, cause: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except OSError:
        raise UserError(
            f"there is no folder {repository}, and the hub cannot be reached to look for it ({first_line(cause)})",
            where=where,
            remedy="Check the path, or connect to the internet once: what was downloaded before is used without it.",
        ) from cause
