"""What an image file says about itself without being decoded: its displayed size, and whether its end is there.

A damaged or truncated file is found before training. Only where the quick look at a file's structure raises a doubt is
the image decoded, so the decoder has the last word and harmless oddities pass.
"""

import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Final

from library.data.caption_files import open_at_once
from library.data.folders import IMAGE_FORMATS, PLUGINS, enable_format
from library.data.spec import Size
from library.errors import first_line

ORIENTATION_TAG: Final = 0x0112
_SIDEWAYS: Final = frozenset((5, 6, 7, 8))
_JPEG_END: Final = b"\xff\xd9"
_JPEG_SCAN: Final = 0xDA
_PNG_START: Final = 8
_LARGE: Final = 1 << 25
_PIXELS_PER_BYTE: Final = 20_000
"""Twice what a blank picture of one bit a pixel comes to in a PNG file."""

_LATE_ORIENTATION: Final = (b"Raw profile type exif", b"XML:com.adobe.xmp")


class UnreadableImageError(Exception):
    """The file is no image, is damaged, or ends too early; the message says which."""


def displayed_size(path: Path) -> Size:
    """Width and height as a viewer shows the image (orientation applied), in pixels; the pixels are not decoded.

    Raises:
        UnreadableImageError: The image cannot be read to its end.
    """
    with without_size_warnings():
        return size_of_many(str(path))


def size_of_many(path: str) -> Size:
    """As :func:`displayed_size` for one of many images, called within :func:`without_size_warnings`."""
    from PIL import Image, UnidentifiedImageError

    if path[path.rfind(".") :].lower() in PLUGINS:
        enable_format(Path(path))
    try:
        with open(path, "rb", opener=open_at_once) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            _check_proportion(image.size, _file_size(file))
            needs_decoding = _raises_doubt(file, image.format or "")
            # PNG's own getexif decodes the image to look behind the pixels, which _raises_doubt has done without.
            orientation = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
            size = image.size
        if needs_decoding:
            size, orientation = _decoded_size(path)
    except Image.DecompressionBombError as problem:
        raise UnreadableImageError("it has more pixels than can be decoded safely") from problem
    except UnidentifiedImageError as problem:
        raise UnreadableImageError(unknown_content(path)) from problem
    except FileNotFoundError as problem:
        raise UnreadableImageError("it is not there, or what it links to is gone") from problem
    except UnreadableImageError:
        raise
    except Exception as problem:  # whatever the bytes make a decoder stumble over
        raise UnreadableImageError(first_line(problem)) from problem
    return (size[1], size[0]) if orientation in _SIDEWAYS else size


def _check_proportion(size: Size, length: int) -> None:
    """Refuse a few bytes that claim to be a very large image: to decode it takes seconds and gigabytes.

    Raises:
        UnreadableImageError: They do.
    """
    pixels = size[0] * size[1]
    if pixels > max(_LARGE, _PIXELS_PER_BYTE * length):
        raise UnreadableImageError(f"it claims to have {size[0]}x{size[1]} pixels, in {length} bytes")


def _decoded_size(path: str) -> tuple[Size, int]:
    """Decode the whole image: its size, and the orientation that is still to be applied, wherever it stands."""
    from PIL import Image

    with Image.open(path, formats=IMAGE_FORMATS) as image:
        image.load()
        return image.size, int(image.getexif().get(ORIENTATION_TAG, 1))


@contextmanager
def without_size_warnings() -> Iterator[None]:
    """Pillow warns of images above 89 megapixels, and refuses them above twice that: the warning helps nobody here."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def unknown_content(path: str) -> str:
    """What is in a file that no decoder knows."""
    with open(path, "rb", opener=open_at_once) as file:
        content = file.read(512)
    if not content:
        return "the file is empty"
    start = content.lstrip()
    if start[:1] == b"<":
        return "it is no image but text such as a web page"
    return "its content is no image that can be read, or its beginning is damaged"


def _raises_doubt(file: BufferedReader, image_format: str) -> bool:
    """Whether the end of the file seems to be missing, or an orientation stands behind the pixels."""
    if image_format == "TIFF":
        # Its parts lie anywhere in it, and Pillow applies its orientation while decoding.
        return True
    return image_format in _CHECKS and _CHECKS[image_format](file)


def _file_size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _png_raises_doubt(file: BufferedReader) -> bool:
    """Step from chunk to chunk to IEND."""
    # Unbuffered: a buffer would be filled anew at every step.
    raw = file.raw
    size = _file_size(file)
    position, has_pixels, late_orientation = _PNG_START, False, False
    while position + 12 <= size:
        raw.seek(position, os.SEEK_SET)
        length, kind = struct.unpack(">I4s", raw.read(8) or b"")
        if kind == b"IEND":
            return late_orientation
        if kind == b"IDAT":
            has_pixels = True
        elif has_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            late_orientation |= kind == b"eXIf" or (raw.read(32) or b"").startswith(_LATE_ORIENTATION)
        position += 12 + length
    return True


def _jpeg_lacks_end(file: BufferedReader) -> bool:
    """No end marker behind the start of the pixels; whatever phones append behind it does not matter."""
    file.seek(-2, os.SEEK_END)
    if file.read(2) == _JPEG_END:
        return False
    file.seek(0)
    content = file.read()
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == _JPEG_SCAN:
            # Inside the scan 0xff is followed by 0 or a restart marker, so this can only be the end.
            return content.find(_JPEG_END, position) < 0
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big") if marker != 0xFF else 1
    return True


def _riff_lacks_end(file: BufferedReader) -> bool:
    file.seek(4)
    return int.from_bytes(file.read(4), "little") + 8 > _file_size(file)


def _bmp_lacks_end(file: BufferedReader) -> bool:
    file.seek(2)
    return int.from_bytes(file.read(4), "little") > _file_size(file)


def _boxes_lack_end(file: BufferedReader) -> bool:
    """Step through the top boxes of an ISO media file; a size of 0 means "to the end"."""
    size = _file_size(file)
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length = int.from_bytes(file.read(4), "big")
        if length == 0:
            return False
        if length == 1:
            file.seek(position + 8)
            length = int.from_bytes(file.read(8), "big")
        position += max(length, 8)
    return position != size


_CHECKS: Final[Mapping[str, Callable[[BufferedReader], bool]]] = MappingProxyType(
    {
        "PNG": _png_raises_doubt,
        "JPEG": _jpeg_lacks_end,
        "MPO": _jpeg_lacks_end,
        "WEBP": _riff_lacks_end,
        "BMP": _bmp_lacks_end,
        "AVIF": _boxes_lack_end,
    }
)
