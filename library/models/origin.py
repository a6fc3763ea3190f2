"""Where a loaded model came from, to take from it again at saving what no part of the model holds."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.files import TensorFile, read_tensors

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A model's file or folder, as it was when the model was loaded.

    Attributes:
        kind: A single file or a Diffusers folder.
        path: Where it is; never shown, as a path may name its user.
        stamp: Size in bytes and time of the last change in ns of a file; None for a folder.
    """

    kind: Literal["file", "folder"]
    path: Path = field(repr=False)
    stamp: tuple[int, int] | None = None


def origin_of(path: Path) -> Origin:
    """The origin of a model that is about to be read from ``path``."""
    path = path.resolve()
    return Origin(kind="folder", path=path) if path.is_dir() else Origin(kind="file", path=path, stamp=_stamp(path))


def source_checkpoint(origin: Origin | None) -> TensorFile | None:
    """The single file that the model came from, mapped; None where it came from elsewhere.

    A file that has vanished or changed meanwhile is not read, and a warning says so: a result is worth more than the
    unused weights it could have had besides.
    """
    if origin is None or origin.kind != "file":
        return None
    file = unchanged_file(origin)
    if file is None:
        _LOG.warning(
            "%s has changed since it was loaded, or can no longer be read: what it holds besides the model (schedule "
            "tables, EMA copies, layers that Stable Diffusion doesn't use) is not carried over; the model itself is "
            "saved whole",
            origin.path.name,
        )
    return file


def unchanged_file(origin: Origin) -> TensorFile | None:
    """The single file of ``origin``, mapped; None where it has vanished or changed since it was loaded."""
    try:
        return read_tensors(origin.path, mapped=True) if _stamp(origin.path) == origin.stamp else None
    except (OSError, UserError):
        return None


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
