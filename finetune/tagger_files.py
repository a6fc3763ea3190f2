"""The files of a tagger: in a local folder, or fetched into one from the hub and compared with the hub's digests."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Final

from finetune.tagger_model import MAPPED, USUAL, Layout, layout_of
from library.errors import UserError, first_line
from library.files import sha256_of_file

_SHA256: Final = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


def tagger_folder(repo_id: str, model_dir: Path, *, force: bool) -> Path:
    """The folder of a tagger with all its files; what is missing is downloaded.

    Args:
        repo_id: ``owner/name``, or ``owner/name/folder`` for the other kind.
        model_dir: Where the folders of taggers lie, or the tagger itself.
        force: Download all files again.

    Raises:
        UserError: Files are missing and cannot be downloaded, or are not what the hub says they are.
    """
    folder = folder_of(repo_id, model_dir)
    if layout_of(folder) is not None and not force:
        return folder
    parts = repo_id.strip("/").split("/")
    if len(parts) < 2:
        raise UserError(
            f"--repo_id {repo_id} is no hub id", where="--repo_id", remedy="Write owner/name, or owner/name/folder."
        )
    layout = USUAL if len(parts) == 2 else MAPPED
    names = [layout.labels, layout.model]
    wanted = names if force else [name for name in names if not (folder / name).is_file()]
    log.info("downloading %s of %s", " and ".join(wanted), repo_id)
    for name in wanted:
        _download("/".join(parts[:2]), "/".join(parts[2:]) or None, name, folder)
    return folder


def folder_of(repo_id: str, model_dir: Path) -> Path:
    """Where the tagger lies, or is to lie: the usual folder below ``model_dir``, or that itself where it holds one."""
    below = model_dir / repo_id.strip("/").replace("/", "_")
    return model_dir if layout_of(below) is None and layout_of(model_dir) is not None else below


def _download(repository: str, subfolder: str | None, name: str, folder: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, RepositoryNotFoundError

    where = f"--repo_id {repository}"
    place = folder / ".download"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = get_hf_file_metadata(hf_hub_url(repository, name, subfolder=subfolder)).etag
        path = Path(hf_hub_download(repository, name, subfolder=subfolder, local_dir=place, force_download=True))
        _compare(path, known, where)
        os.replace(path, folder / name)
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"the hub has no {name} in {'/'.join(filter(None, (repository, subfolder)))}",
            where=where,
            remedy=f"Check the id; it must have {_needed(USUAL)}, or (owner/name/folder) {_needed(MAPPED)}.",
        ) from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"cannot download {name}: {first_line(error)}",
            where=where,
            remedy=f"Connect to the internet once, or put {_needed(USUAL)} into a folder and give it as --model_dir.",
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _needed(layout: Layout) -> str:
    return f"{layout.model} and {layout.labels}"


def _compare(path: Path, known: str | None, where: str) -> None:
    """Refuse a file whose content is not what the hub says; of small files it does not say it."""
    if known is None or not _SHA256.fullmatch(known):
        return
    found = sha256_of_file(path)
    if found != known:
        raise UserError(
            f"{path.name} was damaged on its way: its SHA-256 is {found[:12]}…, the hub says {known[:12]}…",
            where=where,
            remedy="Try again.",
        )
