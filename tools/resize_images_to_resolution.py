"""Make smaller copies of images, one for each of several resolutions.

Usage, from anywhere: ``python tools/resize_images_to_resolution.py SRC_IMG_FOLDER DST_IMG_FOLDER``. A resolution is the
largest area a copy may have; ``cat.png`` becomes ``cat+512x512.jpg`` and so on. Every copy is made of the original.
"""

import logging
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from library.data.folders import is_image  # noqa: E402
from library.data.spec import Size  # noqa: E402
from library.errors import Problem, UserError, run_script  # noqa: E402
from library.files import written_whole  # noqa: E402
from library.option_positions import missing_positions, name_positions, split_positions  # noqa: E402
from library.options import near_remedy, option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402

if TYPE_CHECKING:
    from library.data.images import DecodedImage, Pixels

log = logging.getLogger("resize_images_to_resolution")

DESCRIPTION = "Make copies of the images of a folder, none larger in area than a resolution; other files are copied."
ORDER: Final = ("src_img_folder", "dst_img_folder")
SKIPPED: Final = 1
"""Exit code when images were skipped because they could not be read."""

_JPEG_QUALITY: Final = 100
_PILLOW_FILTERS: Final = {"lanczos4": "LANCZOS", "box": "BOX"}


def _sizes(raw: object) -> tuple[str, ...]:
    """The resolutions in "512x512,384x384", or in a list of such texts, as they are written in names."""
    texts = raw if isinstance(raw, list) else str(raw).split(",")
    sizes = tuple(str(text).strip().lower() for text in texts)
    for size in sizes:
        sides = size.split("x")
        if len(sides) != 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
            raise ValueError("expects resolutions such as 512x512,384x384")
    return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """Files."""

    src_img_folder: Path | None = option(None, metavar="DIR", help="Folder of the images.")
    dst_img_folder: Path | None = option(
        None, metavar="DIR", help="Folder for the copies, which is made; files of the same names are replaced."
    )
    copy_associated_files: bool = option(
        False, help="Copy text files and others called like an image beside each of its copies, under the copy's name."
    )

    def problems(self) -> list[Problem]:
        """What is missing or the same."""
        found = missing_positions({name: getattr(self, name) for name in ORDER})
        if not found and self.src_img_folder == self.dst_img_folder:
            found.append(Problem("both folders are the same", "dst_img_folder", "Give another folder for the copies."))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizeOptions:
    """Copies."""

    max_resolution: str = option(
        "512x512,384x384,256x256,128x128",
        metavar="WxH,...",
        check=lambda text: _objection(text),
        help="Resolutions; a copy has at most the area of its resolution, and is never larger than the image.",
    )
    divisible_by: int = option(
        1, minimum=1, metavar="N", help="Cut both sides in the middle to a multiple of this many pixels."
    )
    interpolation: str | None = option(
        None,
        choices=("area", "cubic", "lanczos4", "nearest", "linear", "box"),
        help="How to resize; area when absent.",
    )
    save_as_png: bool = option(
        False, help="PNG, which keeps every pixel and transparency, instead of JPEG of quality 100."
    )

    @property
    def resolutions(self) -> tuple[str, ...]:
        """The resolutions, as they are written in names."""
        return tuple(dict.fromkeys(_sizes(self.max_resolution)))


def _objection(text: str) -> str | None:
    try:
        _sizes(text)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    place: PlaceOptions
    resize: ResizeOptions


def main(argv: list[str]) -> int:
    """Make the copies; returns the exit code."""
    set_up_logging(ConsoleOptions())
    words, rest = split_positions(Options, argv)
    given = [*name_positions(words, ORDER), *rest]
    options = parse_options(Options, given, prog=f"{Path(__file__).name} {' '.join(ORDER)}", description=DESCRIPTION)
    source, target = options.place.src_img_folder, options.place.dst_img_folder
    assert source is not None, "asked for with the options"
    assert target is not None, "asked for with the options"
    names = _names(source, target)
    images = [name for name in names if is_image(name)]
    _make_folder(target)
    _tell_replaced(target)
    bad: list[str] = []
    for name in tqdm(images, desc="resizing", unit="image", disable=None):
        try:
            _copies(source / name, target, options.resize)
        except UserError as error:
            if not any(problem.where == str(source / name) for problem in error.problems):
                raise
            bad.append(f"{source / name}: {error.problems[0].what}")
            continue
        if options.place.copy_associated_files:
            _copy_associated(source / name, names, target, options.resize.resolutions)
    for name in names:
        if not is_image(name):
            _copy(source / name, target / name)
    log.info(
        "%d images, %d copies in %s",
        len(images) - len(bad),
        (len(images) - len(bad)) * len(options.resize.resolutions),
        target,
    )
    for text in bad:
        log.error("skipped: %s", text)
    return SKIPPED if bad else 0


def _names(source: Path, target: Path) -> list[str]:
    """The files of ``source``, images among them."""
    if not source.is_dir():
        raise UserError(f"folder not found: '{source}'", where="src_img_folder", remedy=near_remedy(source))
    if target.exists() and target.samefile(source):
        raise UserError("both folders are the same", where="dst_img_folder", remedy="Give another folder.")
    # A link that leads nowhere is named like any other image that cannot be read.
    names = sorted(
        entry.name for entry in source.iterdir() if entry.is_file() or (is_image(entry.name) and not entry.is_dir())
    )
    if not any(map(is_image, names)):
        raise UserError(f"no images in the folder '{source}'", where="src_img_folder", remedy="Give their folder.")
    stems = Counter(Path(name).stem for name in names if is_image(name))
    if shared := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(
            f"{len(shared)} names belong to several images, whose copies would replace each other: {', '.join(shared)}",
            where="src_img_folder",
            remedy="Rename the images.",
        )
    return names


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder '{folder}': {error.strerror}", where="dst_img_folder", remedy="Choose another."
        ) from error


def _tell_replaced(folder: Path) -> None:
    count = sum(1 for _ in folder.iterdir())
    if count:
        log.warning("%s holds %d files already; those of the same names are replaced", folder, count)


def _copies(path: Path, folder: Path, options: ResizeOptions) -> None:
    """Write the copies of one image.

    Raises:
        UserError: The image cannot be read (``where`` is its path), or a copy cannot be written.
    """
    from library.data.images import decode

    image = decode(path)
    for resolution in options.resolutions:
        width, height = map(int, resolution.split("x"))
        size = fitting_size(image.size, width * height)
        if min(size) < options.divisible_by:
            raise UserError(
                f"at {resolution} it is {size[0]}x{size[1]} pixels, less than --divisible_by {options.divisible_by}",
                where=str(path),
                remedy="Use a smaller --divisible_by.",
            )
        suffix = ".png" if options.save_as_png else ".jpg"
        _save(image, size, folder / f"{path.stem}+{resolution}{suffix}", options)


def fitting_size(size: Size, area: int) -> Size:
    """``size`` scaled, aspect ratio kept, to at most ``area`` pixels; unchanged where it is not larger."""
    width, height = size
    if width * height <= area:
        return size
    scale = math.sqrt(area / (width * height))
    return max(int(width * scale), 1), max(int(height * scale), 1)


def _save(image: "DecodedImage", size: Size, path: Path, options: ResizeOptions) -> None:
    import numpy as np
    from PIL import Image

    copy = _resized(image.rgb, size, options.interpolation)
    if options.save_as_png and image.alpha is not None:
        alpha = _resized(image.alpha, size, options.interpolation)
        copy = np.dstack([_without_matte(copy, alpha), alpha])
    copy = _cut(copy, options.divisible_by)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        if options.save_as_png:
            Image.fromarray(copy).save(file, format="PNG")
        else:
            Image.fromarray(copy).save(file, format="JPEG", quality=_JPEG_QUALITY)


def _without_matte(rgb: "Pixels", alpha: "Pixels") -> "Pixels":
    """The colours (height, width, 3) that, with ``alpha``, show as ``rgb`` on the background of decoded images."""
    import numpy as np

    from library.data.images import MATTE, OPAQUE

    opacity = np.maximum(alpha, 1)[..., None] / OPAQUE
    colours = MATTE - (MATTE - rgb.astype(np.float64)) / opacity
    return np.rint(np.clip(colours, 0, 255)).astype(np.uint8)


def _resized(pixels: "Pixels", size: Size, interpolation: str | None) -> "Pixels":
    import numpy as np
    from PIL import Image

    from library.data.images import resize

    if interpolation in _PILLOW_FILTERS and (pixels.shape[1], pixels.shape[0]) != size:
        chosen = Image.Resampling[_PILLOW_FILTERS[interpolation]]
        return np.asarray(Image.fromarray(pixels).resize(size, chosen))
    return resize(pixels, size, interpolation or "area")


def _cut(pixels: "Pixels", step: int) -> "Pixels":
    """The middle of ``pixels``, with sides that are multiples of ``step``."""
    height, width = (side // step * step for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _copy_associated(image: Path, names: Sequence[str], folder: Path, resolutions: Sequence[str]) -> None:
    """Copy the files called like ``image`` but for the suffix, once for each of its copies."""
    for name in names:
        other = Path(name)
        if other.stem == image.stem and not is_image(name):
            for resolution in resolutions:
                _copy(image.with_name(name), folder / f"{other.stem}+{resolution}{other.suffix}")


def _copy(source: Path, target: Path) -> None:
    with written_whole(target) as temporary:
        shutil.copyfile(source, temporary)


if __name__ == "__main__":
    run_script(main)
