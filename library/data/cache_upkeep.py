"""Looking after the latent cache on disk: what is wrong with it, why an image is made anew, what nobody uses."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from library.data.cache_entry import Entry, Settings, UnusableEntryError, read_entry
from library.data.cache_places import ENTRY_NAME
from library.data.disk_cache import DiskLatentCache, objection
from library.data.images import ImageView
from library.data.latent_encoding import Use
from library.data.spec import size_text
from library.files import is_temporary

_ABANDONED_SECONDS: Final = 3600
"""A file in the making that has not changed for so long belongs to no process any more."""


def explain(cache: DiskLatentCache, view: ImageView, *, flip: bool, mask: bool = False) -> list[str]:
    """What is looked for as the entry of ``view``, what is found, and what follows from it."""
    settings, place = cache.settings(view), cache.place(view)
    lines = [f"{view.path.name}, {view.size[0]}x{view.size[1]}: {_described(settings)}"]
    for path in place.candidates:
        try:
            entry = read_entry(path)
        except FileNotFoundError:
            lines.append(f"  {path.name}: not there")
        except UnusableEntryError as error:
            lines.append(f"  {path.name}: {error}")
        else:
            reason = objection(entry, view, settings, place, flip=flip, mask=mask)
            lines.append(f"  {path.name}: {_origin(entry)}; {reason or 'the settings fit'}")
    verdict = cache.judge(view, flip=flip, mask=mask, reads_image=True)
    lines.append(f"  it will be made: {verdict.reason}" if verdict.path is None else f"  used: {verdict.path.name}")
    return lines


def unused_files(cache: DiskLatentCache, uses: Mapping[ImageView, Use], *, progress: bool) -> list[Path]:
    """Entries of ours beside the images of ``uses`` that those do not use, and what killed processes left.

    Files of other programs are never among them, as long as they can be read.
    """
    used = {verdict.path for verdict in cache.judge_all(uses, progress=progress).values()}
    folders = sorted({cache.place(view).own.parent for view in uses})
    return [path for folder in folders for path in _ours(folder) if path not in used]


def _ours(folder: Path) -> Iterator[Path]:
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if is_temporary(name) and name.endswith(".npz"):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                yield path
        elif ENTRY_NAME.fullmatch(name) and _is_ours_or_damaged(path):
            yield path


def _is_ours_or_damaged(path: Path) -> bool:
    try:
        return not read_entry(path).is_foreign
    except UnusableEntryError as error:
        return str(error).startswith("damaged")


def summary(reasons: Iterable[str]) -> dict[str, int]:
    """How often each kind of reason occurs, the commonest first."""
    kinds = [reason.partition(":")[0] for reason in reasons]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))}


def _described(settings: Settings) -> str:
    resized, bucket = size_text(settings.resized), size_text(settings.bucket)
    return (
        f"resized to {resized} ({settings.interpolation}), cut to {bucket} at {settings.origin}, "
        f"VAE {settings.vae}, encoding {settings.version}"
    )


def _origin(entry: Entry) -> str:
    if entry.settings is None or entry.source is None:
        return "by another program"
    return f"made of {entry.source.size} bytes ({entry.source.content[:8]}), {_described(entry.settings)}"
