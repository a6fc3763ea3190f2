"""Latents in the place of an image: entries of a metadata file of which only an ``.npz`` is left.

Such a file is trained on as it is. Its geometry is verified; which pixels it comes from, and which VAE, nothing tells.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.data.findings import Finding, error, warning
from library.data.spec import Size, SubsetSpec, size_objection, size_text
from library.errors import UserError

if TYPE_CHECKING:
    from library.data.cache_entry import Entry
    from library.data.images import Pixels

LATENT_SUFFIX: Final = ".npz"
CHANNELS: Final = 4
"""Channels of the latents of Stable Diffusion."""

_SIZED: Final = re.compile(r"(.+)_\d{4,}x\d{4,}_sd\.npz")
"""Names in newer caches: the stem of the image and its size."""

_PUT_BACK: Final = "Put the image back beside it, or remove the entry."


def is_latent_file(file: Path | str) -> bool:
    """Whether a record's file, given by its path or its name, holds latents instead of an image."""
    return str(file).endswith(LATENT_SUFFIX)


@dataclass(frozen=True, slots=True)
class LatentNames:
    """The files of latents in a folder.

    Attributes:
        by_name: The name of the file by that of its image, or by the stem of it; None where several could be meant.
    """

    by_name: Mapping[str, str | None]

    @classmethod
    def of(cls, folder: Path) -> "LatentNames":
        """Those in ``folder``; none where it cannot be read."""
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(LATENT_SUFFIX))
        except OSError:
            names = []
        plain: dict[str, str | None] = {name.removesuffix(LATENT_SUFFIX): name for name in names}
        sized: dict[str, str | None] = {}
        for name in names:
            if match := _SIZED.fullmatch(name):
                sized[match[1]] = None if match[1] in sized else name
        return cls(sized | plain)

    def of_image(self, name: str) -> str | None:
        """The latents of the image called ``name``, with or without its suffix, if they are there and clear."""
        return self.by_name.get(name) or self.by_name.get(os.path.splitext(name)[0])


def read_latents(path: Path) -> "Entry":
    """The latents in ``path``.

    Raises:
        UserError: They are gone or damaged.
    """
    from library.data.cache_entry import UnusableEntryError, read_entry

    try:
        return read_entry(path)
    except FileNotFoundError as problem:
        raise UserError("the latents are gone", where=str(path), remedy=_PUT_BACK) from problem
    except UnusableEntryError as problem:
        raise UserError(f"the latents cannot be used: {problem}", where=str(path), remedy=_PUT_BACK) from problem


def check_latents(
    path: Path, subset: SubsetSpec, bucket: Size | None
) -> tuple[tuple[Size, Size] | None, list[Finding]]:
    """Size of the image and of its bucket as a file of latents tells them, and what is wrong with it.

    Args:
        path: The file.
        subset: Whose rules it must serve.
        bucket: The size that the metadata gives, if it does.
    """
    try:
        entry = read_latents(path)
    except UserError as problem:
        return None, [error(one.what, str(path), one.remedy or _PUT_BACK) for one in problem.problems]
    findings = list(_objections(entry, path, subset, bucket))
    return None if findings else (entry.original_size or entry.bucket, entry.bucket), findings


def _objections(entry: "Entry", path: Path, subset: SubsetSpec, bucket: Size | None) -> Iterator[Finding]:
    where = str(path)
    if entry.mean.shape[0] != CHANNELS or size_objection(entry.bucket):
        shape = "x".join(map(str, entry.mean.shape))
        yield error(f"latents of the shape {shape} are not those of Stable Diffusion 1 or 2", where, _PUT_BACK)
    elif bucket is not None and entry.bucket != bucket:
        yield error(
            f"the latents are those of {size_text(entry.bucket)} pixels, and train_resolution is {size_text(bucket)}",
            where,
            f"Write [{entry.bucket[0]}, {entry.bucket[1]}] there, or put the image back beside the file.",
        )
    if subset.augment.flip_aug and entry.mirrored is None:
        remedy = "Leave out flip_aug for these images, or put the image back beside the file."
        yield error("the file has no mirrored latents, which flip_aug needs", where, remedy)
    if subset.alpha_mask and subset.conditioning_data_dir is None and not entry.has_right_mask:
        what = "no alpha_mask" if entry.mask is None else "an alpha_mask of another size than its latents"
        remedy = "Leave out alpha_mask for these images, or put the image back beside the file."
        yield error(f"the file has {what}", where, remedy)


def judge_latents(paths: Sequence[Path], count: int, subset: SubsetSpec) -> Iterator[Finding]:
    """What must be known of a subset with ``count`` entries that is trained on ``paths`` instead of images."""
    if paths:
        yield warning(
            f"{len(paths)} of {count} entries have latents alone, without an image (for example '{paths[0].name}'): "
            "they are trained on as they are; which pixels and which VAE they come from cannot be verified",
            str(subset.metadata_file),
            "Put the images back to have their latents made, or leave it so if it is meant.",
        )


def picture_of(path: Path) -> "Pixels":
    """A picture of the latents in ``path``, (height, width, 3), to be looked at: their mean over the channels in grey.

    Raises:
        UserError: They are gone or damaged.
    """
    import numpy as np

    from library.data.cache_entry import LATENT_PIXELS

    grey = read_latents(path).mean.mean(axis=0)
    low, high = float(grey.min()), float(grey.max())
    levels = ((grey - low) * (255 / (high - low or 1))).astype(np.uint8)
    return np.repeat(levels.repeat(LATENT_PIXELS, 0).repeat(LATENT_PIXELS, 1)[..., None], 3, axis=2)
