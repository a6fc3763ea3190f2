"""The text files beside images: which are to be written, and what becomes of those that are there."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from finetune.metadata_files import check_writable, quoted
from library.errors import Problem, UserError, raise_if_any
from library.files import LONGEST_NAME, sweep

log = logging.getLogger(__name__)


def text_file(image: Path, extension: str) -> Path:
    """The text file of ``image``."""
    return image.with_name(image.stem + extension)


def has_text(path: Path) -> bool:
    """Whether the text file ``path`` says anything; one that is empty was cut off by a crash.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return bool(path.read_bytes().strip())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"cannot read {path.name}: {error.strerror}", where=str(path), remedy="Make it readable, or remove it."
        ) from error


def to_write(images: Sequence[Path], extension: str, *, skip_existing: bool, extends: bool = False) -> list[Path]:
    """The ``images`` whose text file is to be written; the log says what becomes of files that are there.

    Args:
        images: All images.
        extension: Suffix of the text files.
        skip_existing: Leave out images whose text file says something.
        extends: What is there is kept, and added to.

    Raises:
        UserError: A text file cannot be read, or one cannot be written.
    """
    names = {text_file(image, extension).name for image in images}
    for folder in dict.fromkeys(image.parent for image in images):
        check_writable(folder / f"a{extension}")
        # What a killed run was making; processes that share the images list them before the first one writes.
        sweep(folder, names.__contains__)
    raise_if_any(
        [
            Problem("the name is so long that a text file cannot have it", str(image), "Shorten it.")
            for image in images
            if len(os.fsencode(text_file(image, extension).name)) > LONGEST_NAME
        ]
    )
    images = _one_a_text_file(images, extension)
    existing = {image for image in images if has_text(text_file(image, extension))}
    if existing and skip_existing:
        log.info("%d of %d images have a %s file already and are left out", len(existing), len(images), extension)
        return [image for image in images if image not in existing]
    if existing and extends:
        log.info("%d %s files exist and are added to", len(existing), extension)
    elif existing:
        log.warning("%d %s files exist and are made anew (--skip_existing keeps them)", len(existing), extension)
    return images


def _one_a_text_file(images: Sequence[Path], extension: str) -> list[Path]:
    """The ``images`` without those whose text file another one, before them, has too; the log names them."""
    owners: dict[Path, Path] = {}
    for image in images:
        owners.setdefault(text_file(image, extension), image)
    kept = list(owners.values())
    others = [image for image in images if owners[text_file(image, extension)] != image]
    if others:
        log.warning(
            "%d images have the name of another one, and so the same text file, which is made from the other: %s",
            len(others),
            quoted([str(image) for image in others]),
        )
    return kept
