"""What each pixel weighs in the loss: masks, taken through the same resize and crop as their images."""

import zlib
from pathlib import Path
from typing import TypeAlias

import numpy as np

from library.data.images import ImageView, Pixels, decode, framed_mask
from library.data.spec import Size

PackedMask: TypeAlias = tuple[Size, bytes]
"""Size and compressed levels: masks have large even areas."""


def packed(levels: Pixels) -> PackedMask:
    """``levels`` (height, width) made small."""
    return (levels.shape[1], levels.shape[0]), zlib.compress(levels.tobytes(), 1)


def unpacked(mask: PackedMask) -> Pixels:
    """The levels (height, width) again."""
    (width, height), levels = mask
    return np.frombuffer(zlib.decompress(levels), np.uint8).reshape(height, width)


def mask_levels(image: Path, mask: Path | None, *, use_alpha: bool) -> Pixels | None:
    """The mask of an image, (height, width) in 0..255, or None where nothing masks it.

    Args:
        image: The training image; its alpha channel is the mask where ``use_alpha`` is set and there is no ``mask``.
        mask: A mask image: its red channel, on black where it is transparent.
        use_alpha: As said.

    Raises:
        UserError: A file cannot be read.
    """
    if mask is None:
        return decode(image).alpha if use_alpha else None
    decoded = decode(mask)
    red = decoded.rgb[..., 0]
    if decoded.alpha is None:
        return red
    # It was composed on white, to which transparent pixels have added 255 - alpha.
    return (red.astype(np.int16) - (255 - decoded.alpha.astype(np.int16))).clip(0, 255).astype(np.uint8)


def load_mask(view: ImageView, mask: Path | None, *, use_alpha: bool, origin: Size | None = None) -> Pixels | None:
    """The mask of ``view``, (height, width) in 0..255 at the size of its bucket, or None where nothing masks it.

    Args:
        view: The image as its bucket sees it.
        mask: As :func:`mask_levels`.
        use_alpha: As :func:`mask_levels`.
        origin: Left and top of the crop; None crops in the middle.

    Raises:
        UserError: A file cannot be read.
    """
    levels = mask_levels(view.path, mask, use_alpha=use_alpha)
    if levels is None:
        return None
    return framed_mask(levels, view.placement, origin)
