"""From an image file to the pixels the model is trained on: decode on purpose, fit to a bucket, augment.

Decoding decides what formats leave open: EXIF orientation is applied, transparency is composed on :data:`MATTE` (so the
colour hidden under transparent pixels never shows), 16-bit grey is scaled instead of clipped, CMYK, palette and grey
images become RGB, an ICC profile is converted to sRGB, and of an animation the first frame is taken.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from library.data.buckets import Placement
from library.data.folders import IMAGE_FORMATS, enable_format
from library.data.image_headers import ORIENTATION_TAG, unknown_content
from library.data.spec import Size
from library.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

Pixels: TypeAlias = NDArray[np.uint8]
"""(height, width, 3) RGB, or (height, width) for one channel; 0..255."""

MATTE: Final = 255
"""Grey level of the background that transparent pixels are composed on: white."""

OPAQUE: Final = 255
"""Opacity of a pixel through which nothing shows, and weight of one that counts fully."""

_STRIP: Final = 1 << 20
"""Pixels that are composed at once."""

# Rows and columns are exchanged or reversed as EXIF orientation 2 to 8 asks; 1 is upright.
_UPRIGHT: Final[dict[int, Callable[[Pixels], Pixels]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
_SIXTEEN_BIT_MODES: Final = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# Probability of a jitter, and its limits: hue in steps of 2 degrees (OpenCV's unit), gamma around 1.
_JITTER_PROBABILITY: Final = 0.33
_HUE_LIMIT: Final = 8
_GAMMA_LIMITS: Final = (0.95, 1.05)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as it is seen.

    Attributes:
        rgb: (height, width, 3), sRGB, composed on :data:`MATTE`.
        alpha: (height, width), 255 is opaque; None when the file knows no transparency.
    """

    rgb: Pixels
    alpha: Pixels | None

    @property
    def size(self) -> Size:
        """(width, height)."""
        return self.rgb.shape[1], self.rgb.shape[0]


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image file as a bucket sees it: all that decides its pixels but the crop's position and the augmentation.

    Attributes:
        path: The file.
        size: Size as displayed, as it was when the file was placed.
        placement: Bucket, and size before the crop.
        interpolation: Name of the resize filter; None chooses by scale.
    """

    path: Path
    size: Size
    placement: Placement
    interpolation: str | None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the file has none or one that cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # whatever the bytes make the reader stumble over
        return 1
    return found if found in _UPRIGHT else 1


def decode(path: Path) -> DecodedImage:
    """Read the (first) picture of ``path`` as 8-bit sRGB.

    Raises:
        UserError: The file is missing, truncated, damaged or of a kind without defined colours.
    """
    enable_format(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            turn = _UPRIGHT.get(orientation(image), np.asarray)
            rgb, alpha = _colour_and_alpha(image)
    except FileNotFoundError as error:
        raise UserError("image not found", where=str(path), remedy="Put it back, or remove its entry.") from error
    except Exception as error:  # whatever the bytes make a decoder stumble over
        reason = unknown_content(str(path)) if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(
            f"cannot read the image: {reason}",
            where=str(path),
            remedy="The file is truncated, damaged or of an unknown kind: replace it, or take it out of the folder.",
        ) from error
    if alpha is not None:
        rgb = _composed(rgb, alpha)
        alpha = np.ascontiguousarray(turn(alpha))
    return DecodedImage(np.ascontiguousarray(turn(rgb)), alpha)


def _colour_and_alpha(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    alpha: Pixels | None = None
    base = image
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        # 65535 becomes 255; adding half of 257 rounds.
        base = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = np.asarray(rgba.getchannel("A"))
        # Grey stays grey for the sake of a grey profile.
        base = image.convert("L") if image.mode in ("L", "LA") else rgba.convert("RGB")
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined brightness")
    return np.asarray(_to_srgb(base, image.info.get("icc_profile"))), alpha


def _to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """``image`` as RGB; colours are converted where a profile that fits the image says that they are not sRGB."""
    if not icc_profile:
        return image.convert("RGB")
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        source = _in_profile_space(image, profile.profile.xcolor_space.strip())
        if source is None or "sRGB" in ImageCms.getProfileDescription(profile):
            return image.convert("RGB")
        converted: Any = ImageCms.profileToProfile(source, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        # A damaged profile says nothing about the colours; other programs show such files without it.
        return image.convert("RGB")
    assert isinstance(converted, Image.Image), "a new image unless converted in place"
    return converted


def _in_profile_space(image: Image.Image, space: str) -> Image.Image | None:
    """``image`` in the colour space its profile describes, or None where the profile is for another kind of image."""
    if space == "CMYK" or image.mode == "CMYK":
        return image if space == image.mode else None
    if space == "GRAY":
        return image if image.mode == "L" else None
    return image.convert("RGB") if space == "RGB" else None


def _composed(rgb: Pixels, alpha: Pixels) -> Pixels:
    composed = np.empty_like(rgb)
    # In strips: the largest images would take several gigabytes on the way.
    rows = max(1, _STRIP // alpha.shape[1])
    for top in range(0, len(alpha), rows):
        strip = slice(top, top + rows)
        opacity = alpha[strip, :, None].astype(np.uint32)
        # Adding half of 255 rounds.
        composed[strip] = (rgb[strip] * opacity + MATTE * (255 - opacity) + 127) // 255
    return composed


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image at the size of its bucket.

    Attributes:
        rgb: (height, width, 3).
        opacity: (height, width), 255 is opaque; None when the file knows no transparency.
    """

    rgb: Pixels
    opacity: Pixels | None


def load_view(view: ImageView, *, origin: Size | None = None) -> Pixels:
    """The pixels of ``view``, of the size of its bucket: cropped in the middle, or with left and top at ``origin``.

    Raises:
        UserError: The file cannot be read, or is not the one that was placed.
    """
    return _framed(_decoded(view).rgb, view, origin)


def load_image(view: ImageView, *, origin: Size | None = None) -> LoadedImage:
    """As :func:`load_view`, with the transparency, for which the file is not read again.

    Raises:
        UserError: The file cannot be read, or is not the one that was placed.
    """
    image = _decoded(view)
    opacity = None if image.alpha is None else framed_mask(image.alpha, view.placement, origin)
    return LoadedImage(_framed(image.rgb, view, origin), opacity)


def framed_mask(levels: Pixels, placement: Placement, origin: Size | None = None) -> Pixels:
    """``levels`` (height, width) of a whole image, resized and cropped as its pixels are, but never sharpened.

    Args:
        levels: The mask of the whole image, at any size.
        placement: Where the image is placed.
        origin: Left and top of the crop; None crops in the middle.
    """
    (width, height), resized = placement.bucket, placement.resized
    grows = resized[0] > levels.shape[1] or resized[1] > levels.shape[0]
    left, top = origin or crop_origin(placement, None)
    return resize(levels, resized, "bilinear" if grows else "area")[top : top + height, left : left + width]


def _decoded(view: ImageView) -> DecodedImage:
    image = decode(view.path)
    if image.size != view.size:
        raise UserError(
            f"the image is {image.size[0]}x{image.size[1]} pixels, but was {view.size[0]}x{view.size[1]} at the start",
            where=str(view.path),
            remedy="Do not change the images of a run; start it again.",
        )
    return image


def _framed(rgb: Pixels, view: ImageView, origin: Size | None) -> Pixels:
    placement = view.placement
    pixels = resize(rgb, placement.resized, view.interpolation)
    left, top = origin or crop_origin(placement, None)
    return pixels[top : top + placement.bucket[1], left : left + placement.bucket[0]]


def crop_origin(placement: Placement, crop: Random | None) -> Size:
    """Left and top of the crop: in the middle, or where ``crop`` draws it."""
    surplus = (placement.resized[0] - placement.bucket[0], placement.resized[1] - placement.bucket[1])
    return random_origin(surplus, crop) if crop else centre_origin(surplus)


def centre_origin(surplus: Size) -> Size:
    """Left and top of a centred crop, given what is to be cut off in all; an odd pixel is cut at the far side."""
    return surplus[0] // 2, surplus[1] // 2


def random_origin(surplus: Size, rng: Random) -> Size:
    """Left and top of a crop anywhere, given what is to be cut off in all; the width is drawn first."""
    return rng.randint(0, surplus[0]), rng.randint(0, surplus[1])


def resize(pixels: Pixels, size: Size, interpolation: str | None = None) -> Pixels:
    """``pixels`` resized to ``size`` (width, height).

    Without a named filter, pixels are averaged over their area where no side grows, and Lanczos-filtered otherwise.
    ``lanczos`` is Pillow's, which also filters when shrinking; the others are OpenCV's, of which only ``area`` does.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    chosen = filter_of((width, height), size, interpolation)
    if chosen == "lanczos":
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    import cv2

    filters = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    resized: Pixels = cv2.resize(pixels, size, interpolation=filters[chosen])
    return resized


def filter_of(source: Size, target: Size, interpolation: str | None = None) -> str:
    """The filter that :func:`resize` uses from ``source`` to ``target``; ``none`` where nothing is resized."""
    if source == target:
        return "none"
    grows = target[0] > source[0] or target[1] > source[1]
    return interpolation or ("lanczos" if grows else "area")


def jitter_colour(pixels: Pixels, rng: Random) -> Pixels:
    """With a probability of one third, a slightly other hue or (as often) gamma; else ``pixels`` as they are."""
    if rng.random() >= _JITTER_PROBABILITY:
        return pixels
    if rng.random() < 0.5:
        return shift_hue(pixels, rng.randint(-_HUE_LIMIT, _HUE_LIMIT))
    return apply_gamma(pixels, rng.uniform(*_GAMMA_LIMITS))


def shift_hue(pixels: Pixels, shift: int) -> Pixels:
    """``pixels`` with their hue turned by ``shift`` x 2 degrees."""
    import cv2

    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + shift) % 180
    shifted: Pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return shifted


def apply_gamma(pixels: Pixels, gamma: float) -> Pixels:
    """``pixels`` with every channel x in 0..1 replaced by x to the power of ``gamma``."""
    table = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[pixels]


def to_tensor(pixels: Pixels) -> "torch.Tensor":
    """``pixels`` (height, width, 3) as float32 (3, height, width) in -1..1."""
    import torch

    # A copy: torch takes neither mirrored nor read-only arrays.
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()
