"""Crops around a face (``face_crop_aug_range``), whose place the file name tells: ``<name>_<cx>_<cy>_<w>_<h>``.

The four numbers are the centre and the size of the face in pixels of the image, as face detection tools write them.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import Final

from library.data.buckets import Placement
from library.data.spec import Size

_NAME: Final = re.compile(r".+_(\d+)_(\d+)_(\d+)_(\d+)")
_JITTER: Final = 20
"""Without random crops, the face is moved by at most its size divided by this."""


@dataclass(frozen=True, slots=True)
class Face:
    """Where a face is: its centre and its longer side, in pixels."""

    x: int
    y: int
    side: int


def face_of(stem: str) -> Face | None:
    """The face that the name of an image (without its suffix) tells of, if it does."""
    match = _NAME.fullmatch(stem)
    if match is None:
        return None
    x, y, width, height = (int(number) for number in match.groups())
    return Face(x, y, max(width, height)) if width and height else None


def crop_around(
    face: Face,
    size: Size,
    resolution: Size,
    times: tuple[float, float],
    rng: Random,
    *,
    random_crop: bool,
) -> tuple[Placement, Size]:
    """How an image is shrunk and where it is cropped so that the crop shows the face.

    Args:
        face: The face in the image.
        size: Size of the image, which covers ``resolution``.
        resolution: Size of the crop.
        times: How many times the side of the face the shorter side of the crop measures: least and most. The image is
            never enlarged, and always covers the crop.
        rng: Where the choices come from, in this order: scale, top, left.
        random_crop: The face may be anywhere in the crop, or even outside; else it is near its middle.

    Returns:
        The placement, and left and top of the crop in the shrunk image.
    """
    least = max(resolution[0] / size[0], resolution[1] / size[1])
    smallest = min(1.0, max(least, min(resolution) / (face.side * times[1])))
    largest = min(1.0, max(least, min(resolution) / (face.side * times[0])))
    scale = rng.uniform(smallest, largest) if smallest < largest else smallest
    # Rounding must not leave the image a pixel too small.
    resized = (max(resolution[0], round(size[0] * scale)), max(resolution[1], round(size[1] * scale)))
    side = 0 if times[0] == times[1] else round(face.side * scale)
    top, left = (
        _start(round(centre * scale), length, target, rng, jitter=side // _JITTER, random_crop=random_crop)
        for centre, length, target in ((face.y, resized[1], resolution[1]), (face.x, resized[0], resolution[0]))
    )
    return Placement(resolution, resized), (left, top)


def _start(centre: int, length: int, target: int, rng: Random, *, jitter: int, random_crop: bool) -> int:
    """Where a crop of ``target`` pixels begins along a side of ``length``, with ``centre`` about in its middle."""
    start = centre - target // 2
    if random_crop:
        # The sum of two draws: far from the face is rare.
        reach = max(length - centre, centre)
        start += rng.randint(0, reach) + rng.randint(0, reach) - reach
    elif jitter:
        start += rng.randint(-jitter, jitter)
    return max(0, min(start, length - target))
