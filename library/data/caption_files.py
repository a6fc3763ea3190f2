"""Caption files: which one belongs to an image, and what it says."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Final

CAPTION_SUFFIXES: Final = (".txt", ".caption", ".captions", ".tags", ".tag", ".cap", ".text")
"""Suffixes that caption files commonly have."""

NO_CAPTION_FILES: Final = ".none"
"""A caption extension that begins like this says on purpose that there are no caption files."""

LONGEST_TEXT: Final = 1 << 18
"""Bytes that the captions of one image may have, all alternatives together; a model reads about a thousand of them."""

_CHUNK: Final = 1 << 16
_FACE_PARTS: Final = 4


class UnreadableCaptionError(Exception):
    """The file is no UTF-8 text; the message says where it goes wrong and what the encoding may be."""


class LongCaptionError(UnreadableCaptionError):
    """The file is longer than any caption."""


def index_names(names: Iterable[str]) -> dict[str, str]:
    """A folder's file names, to be found by :func:`caption_name`: the case of their suffix does not matter."""
    exact = {name: name for name in names}
    # Names without capitals are their own key.
    other = sorted((name for name in exact if name != name.lower()), reverse=True)
    return {_key(name): name for name in other} | exact


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


def caption_names(images: Iterable[str], extension: str, names: Set[str]) -> dict[str, str | None]:
    """The caption file of each image by the name of the image, or None.

    Args:
        images: File names of images that are not hidden.
        extension: Caption extension, with its dot.
        names: The names of all files of the folder.
    """
    found: dict[str, str | None] = dict.fromkeys(images)
    if extension.islower():
        # The usual case, which a large folder has many times.
        for image in found:
            exact = image[: image.rfind(".")] + extension
            if exact in names:
                found[image] = exact
    rest = [image for image, name in found.items() if name is None]
    if rest:
        index = index_names(names)
        found.update((image, caption_name(image, extension, index)) for image in rest)
    return found


def open_at_once(path: str, flags: int) -> int:
    """An opener for :func:`open` that does not wait for another program where a pipe has the name of a file."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | Path) -> str:
    """What the text file ``path`` holds; a byte-order mark is no part of it.

    Raises:
        UnreadableCaptionError: The file is not UTF-8, or is longer than any caption (:class:`LongCaptionError`).
        OSError: The file cannot be opened.
    """
    content = b""
    # Unbuffered: captions are short, and of a file without an end no more is read than is needed to see that.
    with open(path, "rb", buffering=0, opener=open_at_once) as file:
        while chunk := file.read(_CHUNK):
            content += chunk
            if len(content) > LONGEST_TEXT:
                raise LongCaptionError(f"it has more than {LONGEST_TEXT} bytes, and is no caption")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as mistake:
        raise UnreadableCaptionError(_explain_encoding(content, mistake.start)) from mistake
    if "\0" in text:
        raise UnreadableCaptionError(_explain_encoding(content, content.index(0)))
    return text


def caption_in(text: str, *, all_lines: bool) -> tuple[str, int]:
    """The caption that the content of a caption file holds, and the number of its lines that are not blank.

    Args:
        text: What the file holds.
        all_lines: Keep every line that is not blank (for wildcards) instead of the first line alone.
    """
    single = text.rstrip()
    if "\n" not in single and "\r" not in single:
        return single.lstrip(), 1 if single else 0
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [line.strip() for line in lines if line.strip()]
    return "\n".join(filled) if all_lines else lines[0].strip(), len(filled)


def _explain_encoding(content: bytes, offset: int) -> str:
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content
    guess = "UTF-16" if is_utf16 else "Windows-1252 or another 8-bit code page"
    line = content.count(b"\n", 0, offset) + 1
    return f"not UTF-8 at byte {offset} (line {line}); it looks like {guess}"
