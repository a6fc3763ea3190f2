"""Which size each image is trained at: resolutions of equal area and different aspect ratio, and the best fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from library.data.spec import BucketRules, Size
from library.errors import UserError

_MOST_COVER: Final = 64
"""How many times the area of its bucket an image may have when it is resized; the rest is cut off."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image is fitted: resized, keeping its aspect ratio, then cropped to the bucket.

    Attributes:
        bucket: Size it is trained at.
        resized: Size before the crop; no side is shorter than the bucket's.
    """

    bucket: Size
    resized: Size

    @property
    def crop_loss(self) -> float:
        """Share of the image's area, 0..1, that the crop cuts off."""
        return 1 - (self.bucket[0] * self.bucket[1]) / (self.resized[0] * self.resized[1])


def aspect_error(size: Size, placement: Placement) -> float:
    """Aspect ratio (width / height) of the bucket minus that of the image."""
    return placement.bucket[0] / placement.bucket[1] - size[0] / size[1]


def bucket_resolutions(resolution: Size, rules: BucketRules) -> list[Size]:
    """The sizes of all buckets, sorted: as large as the area of ``resolution`` allows, sides on the step's grid.

    Every width from the shortest to the longest side is paired with the largest height that keeps the area, and both
    orientations are taken; the square is always among them. Without buckets there is only ``resolution``, and with
    ``bucket_no_upscale`` the images decide and this list is not used.
    """
    if not rules.enable_bucket:
        return [resolution]
    step, longest = rules.bucket_reso_steps, rules.max_bucket_reso
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area)) // step * step
    found = {(square, square)}
    for width in range(rules.min_bucket_reso, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= rules.min_bucket_reso:
            found |= {(width, height), (height, width)}
    return sorted(found)


def place(size: Size, resolution: Size, rules: BucketRules, resolutions: Sequence[Size]) -> Placement:
    """The bucket of an image of ``size``, and the size to resize it to.

    Args:
        size: Size of the image as displayed, in pixels.
        resolution: Training resolution of its data set.
        rules: Bucket rules of its data set.
        resolutions: What :func:`bucket_resolutions` gives for the two.

    Raises:
        UserError: The image is too narrow, or too small for a bucket and must not be enlarged.
    """
    if rules.enable_bucket and rules.bucket_no_upscale:
        return _place_without_enlarging(size, resolution[0] * resolution[1], rules.bucket_reso_steps)
    bucket = size if size in resolutions else nearest_aspect(size, resolutions)
    return Placement(bucket, cover(size, bucket))


def nearest_aspect(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution whose aspect ratio is nearest to that of ``size``; of equally near ones the first."""
    aspect = size[0] / size[1]
    return min(resolutions, key=lambda candidate: abs(candidate[0] / candidate[1] - aspect))


def cover(size: Size, bucket: Size) -> Size:
    """``size`` scaled, aspect ratio kept, so that it just covers ``bucket``; rounded to whole pixels.

    Raises:
        UserError: It would become very much larger than the bucket.
    """
    width, height = size
    is_wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if is_wider else bucket[0] / width
    resized = int(width * scale + 0.5), int(height * scale + 0.5)
    if resized[0] * resized[1] > _MOST_COVER * bucket[0] * bucket[1]:
        raise UserError(
            f"an image of {width}x{height} pixels is too narrow: to cover {bucket[0]}x{bucket[1]}, it would be resized "
            f"to {resized[0]}x{resized[1]}",
            remedy="Remove the image, or crop it to a less extreme shape.",
        )
    return resized


def _place_without_enlarging(size: Size, area: int, step: int) -> Placement:
    resized = size if size[0] * size[1] <= area else _shrunk_to_area(size, area, step)
    bucket = (_floor_to(resized[0], step), _floor_to(resized[1], step))
    if 0 in bucket:
        raise UserError(
            f"an image of {size[0]}x{size[1]} pixels fits no bucket: a side would be shorter than {step} pixels",
            remedy="Remove the image, crop it to a less extreme shape, or train without bucket_no_upscale.",
        )
    return Placement(bucket, resized)


def _shrunk_to_area(size: Size, area: int, step: int) -> Size:
    """The largest size of at most ``area`` with one side on the grid; of the two, the one whose bucket errs less."""
    aspect = size[0] / size[1]
    width = math.sqrt(area * aspect)
    on_width = _floor_to(width, step)
    on_height = _floor_to(area / width, step)
    error_on_width = _ratio_error(on_width, _floor_to(on_width / aspect, step), aspect)
    error_on_height = _ratio_error(_floor_to(on_height * aspect, step), on_height, aspect)
    if error_on_width < error_on_height:
        return on_width, int(on_width / aspect + 0.5)
    return int(on_height * aspect + 0.5), on_height


def _ratio_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf


def _floor_to(length: float, step: int) -> int:
    """``length`` rounded to whole pixels, then down to the grid of ``step``."""
    return int(length + 0.5) // step * step
