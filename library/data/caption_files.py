"""Caption files: which one belongs to an image, and what it says."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CAPTION_SUFFIXES: Final = (".txt", ".caption", ".captions", ".tags", ".tag", ".cap", ".text")
"""Suffixes that caption files commonly have."""

NO_CAPTION_FILES: Final = ".none"
"""A caption extension that begins like this says on purpose that there are no caption files."""

_FACE_PARTS: Final = 4


class UnreadableCaptionError(Exception):
    """The file is no UTF-8 text; the message says where it goes wrong and what the encoding may be."""


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """What a caption file says.

    Attributes:
        text: Its first line, or all lines that are not blank when wildcards are on; without surrounding spaces.
        lines: Number of lines that are not blank.
    """

    text: str
    lines: int


def index_names(names: Iterable[str]) -> dict[str, str]:
    """A folder's file names, to be found by :func:`caption_name`: the case of their suffix does not matter."""
    ordered = sorted(names, reverse=True)
    return {_key(name): name for name in ordered} | {name: name for name in ordered if _key(name) == name}


def _key(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def caption_name(image_name: str, extension: str, names: Mapping[str, str]) -> str | None:
    """The caption file of an image, or None.

    Args:
        image_name: File name of the image.
        extension: Caption extension, with its dot.
        names: What :func:`index_names` gives for the folder.
    """
    stem = os.path.splitext(image_name)[0]
    # A face crop is called <name>_<cx>_<cy>_<w>_<h> and may share the caption of <name>.
    parts = stem.split("_")
    stems = [stem, "_".join(parts[:-_FACE_PARTS])] if len(parts) > _FACE_PARTS else [stem]
    found = (names.get(_key(candidate + extension)) for candidate in stems)
    return next((name for name in found if name is not None), None)


def read_caption(path: Path, *, all_lines: bool) -> CaptionFile:
    """The caption in ``path``; a byte-order mark is no part of it.

    Args:
        path: The caption file.
        all_lines: Keep every line (for wildcards) instead of the first.

    Raises:
        UnreadableCaptionError: The file is not UTF-8.
        OSError: The file cannot be opened.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as mistake:
        raise UnreadableCaptionError(_explain_encoding(content, mistake.start)) from mistake
    if "\0" in text:
        raise UnreadableCaptionError(_explain_encoding(content, content.index(0)))
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [line.strip() for line in lines if line.strip()]
    return CaptionFile("\n".join(filled) if all_lines else lines[0].strip(), len(filled))


def _explain_encoding(content: bytes, offset: int) -> str:
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content
    guess = "UTF-16" if is_utf16 else "Windows-1252 or another 8-bit code page"
    line = content.count(b"\n", 0, offset) + 1
    return f"not UTF-8 at byte {offset} (line {line}); it looks like {guess}"
