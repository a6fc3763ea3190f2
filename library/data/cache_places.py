"""Where the entries of the latent cache lie: beside the images, under the name that other training programs use.

That name is ``<stem>_<W>x<H>_sd.npz`` with the size of the image in four digits. It is too short for two cases, which
get names of ours: images that share a stem (``a.png`` and ``a.jpg``) keep their suffix in it, and what is made of an
image with other settings than the entry that has the name already goes beside it, under ``..._sd.<settings>.npz``.

A metadata file may name images anywhere, but nothing is written there: the entry of an image that lies neither below
the image folder nor below that of the metadata file goes into the image folder, as ``<stem>-<digest of its path>_...``.

A stem that leaves no room for the rest (systems allow names of 255 bytes) is cut, with a digest in place of its end.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from library.data.folders import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES
from library.data.images import ImageView
from library.files import LONGEST_NAME

ENTRY_NAME: Final = re.compile(r".+_\d{4,}x\d{4,}_sd(\.[0-9a-f]{8})?\.npz")
"""Names of entries, ours and those we share with other programs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the entry of an image may lie.

    Attributes:
        shared: The name that other programs know.
        own: The name that only these settings have.
        elsewhere: Where it is looked for, too, and never written: the name that older programs used, where it cannot be
            another image's, and the place beside an image that lies outside the folders of its data set.
        may_share: Whether ``shared`` may be written to: by one view of an image only.
        is_certain: Whether a foreign file of the shared name can only be this image's.
        is_sized: Whether a metadata file says at which size the image is trained.
        is_moved: Whether the image lies outside the folders of its data set, and its entry inside.
    """

    shared: Path
    own: Path
    elsewhere: tuple[Path, ...]
    may_share: bool
    is_certain: bool
    is_sized: bool = False
    is_moved: bool = False

    @property
    def candidates(self) -> tuple[Path, ...]:
        """Where to look, in order."""
        return (self.own, self.shared, *self.elsewhere)

    @property
    def written(self) -> tuple[Path, Path]:
        """Where may be written."""
        return self.own, self.shared


@dataclass(frozen=True, slots=True)
class Home:
    """What the data set of an image says about the place of its entry.

    Attributes:
        folders: Below these may be written, and into the first where the image lies below none; none: beside the image.
        is_sized: Whether a metadata file says at which size the image is trained.
    """

    folders: tuple[Path, ...] = ()
    is_sized: bool = False


class Places:
    """The places of the entries of a training set; it can be sent to another process."""

    def __init__(self, homes: Mapping[ImageView, Home]) -> None:
        """Look for images that could be taken for one another.

        Args:
            homes: All views that a run encodes, in the order of encoding.
        """
        self._homes = homes
        self._new_folders = {
            key: _folder_to_write(*key) for key in {(view.path.parent, home.folders) for view, home in homes.items()}
        }
        images: set[Path] = set()
        self._secondary: set[ImageView] = set()
        for view in homes:
            if view.path in images:
                self._secondary.add(view)
            images.add(view.path)
        self._doubtful = {path for folder in {path.parent for path in images} for path in _doubtful(folder)}

    def of(self, view: ImageView, settings: str) -> Place:
        """The place of ``view``, for settings with the digest ``settings``."""
        path = view.path
        is_certain = path not in self._doubtful
        width, height = view.size
        stem, rest = path.stem if is_certain else path.name, f"_{width:04d}x{height:04d}_sd"
        home = self._homes[view]
        folder = self._new_folders[path.parent, home.folders]
        older = (path.with_suffix(".npz"),) if is_certain else ()
        beside = (path.with_name(_fitting(stem, f"{rest}.npz")), *older)
        elsewhere, shared = beside[1:], beside[0]
        if folder is not None:
            stem = f"{stem}-{_digest(os.path.realpath(path))}"
            elsewhere, shared = beside, folder / _fitting(stem, f"{rest}.npz")
        return Place(
            shared=shared,
            own=shared.with_name(_fitting(stem, f"{rest}.{settings}.npz")),
            elsewhere=elsewhere,
            may_share=view not in self._secondary,
            is_certain=is_certain,
            is_sized=home.is_sized,
            is_moved=folder is not None,
        )


def _folder_to_write(folder: Path, allowed: Sequence[Path]) -> Path | None:
    """Where to write the entries of images in ``folder``, where that is not allowed itself; links are followed."""
    real = os.path.realpath(folder)
    roots = [os.path.realpath(root) for root in allowed]
    if not roots or any(os.path.commonpath((real, root)) == root for root in roots if _on_one_drive(real, root)):
        return None
    return next((root for root in allowed if root.is_dir()), allowed[0])


def _on_one_drive(one: str, other: str) -> bool:
    return os.path.splitdrive(one)[0] == os.path.splitdrive(other)[0]


def _fitting(stem: str, rest: str) -> str:
    """``stem`` and ``rest`` as one file name, with a digest for the end of a stem that leaves too little room."""
    if len(os.fsencode(stem + rest)) <= LONGEST_NAME:
        return stem + rest
    rest = f"-{_digest(stem)}{rest}"
    while len(os.fsencode(stem + rest)) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + rest


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()


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
