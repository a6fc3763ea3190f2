"""Mask images: which one belongs to a training image, and whether masks can do what they are meant to.

A mask says how much each pixel weighs in the loss: its red channel, from black (nothing) to white (fully). It is an
image of its own in ``conditioning_data_dir``, called like the training image; or, with ``alpha_mask``, the transparency
of the training image.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.data.findings import Finding, error, warning
from library.data.folder_files import FolderFiles
from library.data.folders import explain_image_dir, image_names
from library.data.image_headers import UnreadableImageError
from library.data.spec import Size, SubsetSpec, size_text
from library.errors import UserError
from library.wording import named

if TYPE_CHECKING:
    from library.data.records import ImageRecord

_MOST_NAMED: Final = 5
_MOST_LOOKED_AT: Final = 8
"""Masks that are decoded to see whether they have an effect."""

_ASPECT_TOLERANCE: Final = 0.02
"""Relative difference of width / height by which a mask may differ: sizes are whole pixels."""


def find_masks(images: Sequence[Path], subset: SubsetSpec) -> tuple[list[Path | None], list[Finding]]:
    """The mask of each image of a subset, and what is wrong with the folder of masks.

    A mask has the name of its image, or the same up to the suffix. Regularisation images may be without.
    """
    folder = subset.conditioning_data_dir
    if folder is None or not images:
        return [None] * len(images), []
    setting = '--conditioning_data_dir="{}"' if subset.where.startswith("--") else "conditioning_data_dir = '{}'"
    if advice := explain_image_dir(folder, setting=setting):
        return [None] * len(images), [error(f"masks: {advice.what}", subset.where, advice.remedy)]
    names = image_names(folder)
    index = {os.path.splitext(name)[0]: name for name in reversed(names)} | {name: name for name in names}
    found = [index.get(image.name) or index.get(image.stem) for image in images]
    without = [image.name for image, name in zip(images, found, strict=True) if name is None]
    findings: list[Finding] = []
    if without and not subset.is_reg:
        findings.append(
            error(
                f"{len(without)} of {len(images)} images in '{subset.name}' have no mask in '{folder}': "
                f"{named(without, _MOST_NAMED)}",
                subset.where,
                f"Save a mask for each under the image's name, for example '{Path(without[0]).stem}.png'; where the "
                "whole image counts, a white one.",
            )
        )
    return [None if name is None else folder / name for name in found], findings


def unused_masks(subsets: Iterable[SubsetSpec], used: Collection[Path]) -> Iterator[Finding]:
    """Masks that belong to no image, in folders of which others do.

    Args:
        subsets: All subsets; several may share a folder of masks.
        used: The masks of all records.
    """
    asked = {subset.conditioning_data_dir: subset for subset in subsets if subset.conditioning_data_dir is not None}
    for folder, subset in asked.items():
        names = image_names(folder)
        unused = [name for name in names if folder / name not in used]
        if unused and len(unused) < len(names):
            yield warning(
                f"{len(unused)} masks in '{folder}' belong to no image: {named(unused, _MOST_NAMED)}",
                subset.where,
                "Give them the names of their images, or remove them.",
            )


def lint_masks(subset: SubsetSpec, records: Sequence["ImageRecord"]) -> Iterator[Finding]:
    """Masks of a wrong shape, and masks that change nothing or leave nothing to learn (a few are looked at)."""
    if subset.conditioning_data_dir is not None:
        yield from _lint_shapes(subset, FolderFiles(subset.conditioning_data_dir), records)
    elif not subset.alpha_mask:
        return
    step = max(1, len(records) // _MOST_LOOKED_AT)
    ranges = [found for record in records[::step] if (found := _range(record, subset)) is not None]
    if not ranges:
        return
    kind = "masks" if subset.conditioning_data_dir is not None else "images"
    seen = f"all {kind} looked at in '{subset.name}' ({len(ranges)})"
    if all(low == 255 for low, _ in ranges):
        what = "are white: they change nothing" if kind == "masks" else "are opaque: alpha_mask changes nothing"
        remedy = "Paint black what is not to be learnt." if kind == "masks" else "Save them with transparency (.png)."
        yield warning(f"{seen} {what}", subset.where, remedy)
    if all(high == 0 for _, high in ranges):
        what = "are black" if kind == "masks" else "are wholly transparent"
        yield error(f"{seen} {what}: nothing is left to learn", subset.where, "Paint white what is to be learnt.")


def _lint_shapes(subset: SubsetSpec, masks: FolderFiles, records: Sequence["ImageRecord"]) -> Iterator[Finding]:
    damaged: list[str] = []
    misshapen: list[str] = []
    masked = [(record.mask.name, record.size) for record in records if record.mask is not None]
    sizes = masks.sizes(name for name, _ in masked)
    masks.remember()
    for name, image in masked:
        size = sizes[name]
        if isinstance(size, UnreadableImageError):
            damaged.append(name)
        elif not _same_shape(size, image):
            misshapen.append(f"{name} {size_text(size)} for {size_text(image)}")
    if damaged:
        what = f"{len(damaged)} masks of '{subset.name}' cannot be read: {named(damaged, _MOST_NAMED)}"
        yield error(what, subset.where, "Replace the files with whole copies.")
    if misshapen:
        yield error(
            f"{len(misshapen)} masks of '{subset.name}' do not have the shape of their image: "
            f"{named(misshapen, _MOST_NAMED)}",
            subset.where,
            "Save each mask at the size of its image.",
        )


def _same_shape(mask: Size, image: Size) -> bool:
    return abs(mask[0] * image[1] / (mask[1] * image[0]) - 1) <= _ASPECT_TOLERANCE


def _range(record: "ImageRecord", subset: SubsetSpec) -> tuple[int, int] | None:
    """The darkest and the brightest level of a record's mask; None without a mask, or one that cannot be read."""
    from library.data.masks import mask_levels

    try:
        levels = mask_levels(record.path, record.mask, use_alpha=subset.alpha_mask)
    except UserError:
        return None
    if levels is None:
        return None if record.is_reg else (255, 255)
    return int(levels.min()), int(levels.max())
