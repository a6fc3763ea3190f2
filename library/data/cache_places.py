"""Where the entries of the latent cache lie: beside the images, under the name that other training programs use.

That name is ``<stem>_<W>x<H>_sd.npz`` with the size of the image in four digits. It is too short for two cases, which
get names of ours: images that share a stem (``a.png`` and ``a.jpg``) keep their suffix in it, and what is made of an
image with other settings than the entry that has the name already goes beside it, under ``..._sd.<settings>.npz``.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from library.data.folders import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES
from library.data.images import ImageView

ENTRY_NAME: Final = re.compile(r".+_\d{4,}x\d{4,}_sd(\.[0-9a-f]{8})?\.npz")
"""Names of entries, ours and those we share with other programs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the entry of an image may lie.

    Attributes:
        shared: The name that other programs know.
        own: The name that only these settings have.
        legacy: The name that older programs used; never written. None where it could be another image's.
        may_share: Whether ``shared`` may be written to: by one view of an image only.
        is_certain: Whether a foreign file of the shared name can only be this image's.
    """

    shared: Path
    own: Path
    legacy: Path | None
    may_share: bool
    is_certain: bool

    @property
    def candidates(self) -> tuple[Path, ...]:
        """Where to look, in order."""
        return (self.own, self.shared) if self.legacy is None else (self.own, self.shared, self.legacy)


class Places:
    """The places of the entries of a training set; it can be sent to another process."""

    def __init__(self, views: Iterable[ImageView]) -> None:
        """Look for images that could be taken for one another.

        Args:
            views: All views that a run encodes, in the order of encoding.
        """
        images: set[Path] = set()
        self._secondary: set[ImageView] = set()
        for view in views:
            if view.path in images:
                self._secondary.add(view)
            images.add(view.path)
        self._doubtful = {path for folder in {path.parent for path in images} for path in _doubtful(folder)}

    def of(self, view: ImageView, settings: str) -> Place:
        """The place of ``view``, for settings with the digest ``settings``."""
        path = view.path
        is_certain = path not in self._doubtful
        width, height = view.size
        name = f"{path.stem if is_certain else path.name}_{width:04d}x{height:04d}_sd"
        return Place(
            shared=path.with_name(f"{name}.npz"),
            own=path.with_name(f"{name}.{settings}.npz"),
            legacy=path.with_suffix(".npz") if is_certain else None,
            may_share=view not in self._secondary,
            is_certain=is_certain,
        )


def _doubtful(folder: Path) -> set[Path]:
    """The images in ``folder`` whose stem is another one's stem or whole name.

    Names are compared as the least exact file system does: without regard to case and to the form of accents.
    """
    try:
        names = [name for name in os.listdir(folder) if _suffix(name) in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES]
    except OSError:
        return set()
    stems = Counter(_folded(os.path.splitext(name)[0]) for name in names)
    whole = {_folded(name) for name in names}
    return {
        folder / name
        for name in names
        for stem in [_folded(os.path.splitext(name)[0])]
        if stems[stem] > 1 or stem in whole
    }


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
