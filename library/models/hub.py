"""Models on the Hugging Face hub: fetch the files that are needed, no others, into the hub's own cache."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from library.errors import Problem, UserError, first_line
from library.models.detect import PARTS, WEIGHT_FILES
from library.models.recognise import MODEL_FLAG, VAE_FLAG


def fetch_model(repository: str) -> Path:
    """The local Diffusers folder of a model on the hub, downloaded unless it is in the cache already.

    Args:
        repository: The hub id, ``owner/name``.

    Raises:
        UserError: No such model, no access, no connection, or nothing there in Diffusers' layout.
    """
    return fetch_files(repository, model_files, flag=MODEL_FLAG, unusable=_no_parts)


def fetch_vae(repository: str) -> Path:
    """The local folder of a VAE on the hub, at its root or below ``vae``; as :func:`fetch_model`."""
    return fetch_files(repository, vae_files, flag=VAE_FLAG, unusable=_no_parts)


def fetch_configuration(repository: str, *, flag: str) -> Path:
    """The local folder with a model's configuration and tokenizer, without weights; as :func:`fetch_model`."""
    return fetch_files(repository, configuration_files, flag=flag, unusable=_no_parts)


def configuration_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that describe scheduler, tokenizer and U-Net; empty if one of them is missing."""
    known = set(names)
    needed = {"scheduler/scheduler_config.json", "unet/config.json", "tokenizer/vocab.json"}
    return sorted(known & needed | set(_tokenizer_files(known))) if needed <= known else []


def model_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that a Diffusers model needs, one file of weights a part; empty if it is none."""
    known = set(names)
    general = {"model_index.json", "scheduler/scheduler_config.json"}
    wanted = sorted(known & general)
    wanted += _tokenizer_files(known)
    for part in PARTS:
        files = _part_files(known, f"{part}/", part)
        if not files:
            return []
        wanted += files
    return wanted


def vae_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that are its VAE, at its root or below ``vae``; empty if it has none."""
    known = set(names)
    return _part_files(known, "", "vae") or _part_files(known, "vae/", "vae")


def _tokenizer_files(known: set[str]) -> list[str]:
    return sorted(name for name in known if name.startswith("tokenizer/") and name.endswith((".json", ".txt")))


def _part_files(known: set[str], prefix: str, part: str) -> list[str]:
    weights = [prefix + name for name in WEIGHT_FILES[part] if prefix + name in known]
    config = f"{prefix}config.json"
    return [config, weights[0]] if weights and config in known else []


def fetch_files(
    repository: str,
    choose: Callable[[Iterable[str]], list[str]],
    *,
    flag: str,
    unusable: Callable[[list[str]], Problem],
) -> Path:
    """The local folder with the files that ``choose`` picks from a repository of the hub.

    Args:
        repository: The hub id, ``owner/name``.
        choose: The names of all its files -> those that are needed; none if it is of no use.
        flag: The option that names it.
        unusable: What is to be said of the names of all its files if it is of no use.

    Raises:
        UserError: No such model, no access, no connection, or nothing to pick.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    where = f"{flag} {repository}"
    try:
        # One request; listing the tree would try again for 20 seconds where there is no connection.
        names = [file.rfilename for file in HfApi().model_info(repository).siblings or ()]
        wanted = choose(names)
        if not wanted:
            raise UserError.of([replace(unusable(names), where=where)])
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except GatedRepoError as error:
        raise UserError(
            f"access to {repository} has to be granted first",
            where=where,
            remedy="Accept its terms on its page at the hub, then log in with: hf auth login",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"no file or folder {repository}, and no such model on the hub (or it is private)",
            where=where,
            remedy="Check the path or the hub id; for a private model log in with: hf auth login",
        ) from error
    except (OSError, HTTPError) as error:
        folder = downloaded(repository, choose)
        if folder is not None:
            return folder
        raise UserError(
            f"there is no file or folder {repository}, and the hub cannot be reached to look for it "
            f"({first_line(error)})",
            where=where,
            remedy="Check the path, or connect to the internet once: what was downloaded before is used without it.",
        ) from error


def downloaded(repository: str, choose: Callable[[Iterable[str]], list[str]]) -> Path | None:
    """The local folder of a hub model that was downloaded before, if what is needed of it is there; asks nobody.

    Args:
        repository: The hub id, ``owner/name``.
        choose: As for :func:`fetch_files`.
    """
    from huggingface_hub import snapshot_download

    try:
        # Without a pattern it would want every file that the repository has.
        folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return folder if choose(names) else None


def _no_parts(names: list[str]) -> Problem:
    files = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
    if files:
        remedy = f"Download one of its files ({', '.join(files[:3])}) and give that file's path."
        return Problem("this hub model has no parts in Diffusers' layout", remedy=remedy)
    return Problem("this hub model holds no weights", remedy="Check the hub id.")
