"""What a training set is made of, before any image is opened: data sets, their subsets, and the rules for each.

Everything here is resolved: values have fallen back (subset, data set, general, command line, default) and are checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""

_GRID: Final = 8
"""The VAE shrinks by 8."""

_SHORTEST_SIDE: Final = 64
"""The U-Net shrinks by another 8."""

_LONGEST_SIDE: Final = 4096
_LARGEST_AREA: Final = 2048 * 2048
"""Sixteen times what the models were trained on; no GPU trains more in one piece."""


def size_text(size: Size) -> str:
    """``size`` as people write it: width, then height."""
    return f"{size[0]}x{size[1]}"


def size_objection(size: Size) -> str | None:
    """Why images cannot be trained at ``size`` where a file asks for it; None where they can."""
    if any(side % _GRID for side in size):
        return f"sides are multiples of {_GRID} pixels"
    if min(size) < _SHORTEST_SIDE or max(size) > _LONGEST_SIDE:
        return f"sides have {_SHORTEST_SIDE} to {_LONGEST_SIDE} pixels"
    return f"the area is at most {_LARGEST_AREA} pixels" if size[0] * size[1] > _LARGEST_AREA else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """How a caption's text becomes the text that is trained on; an empty string means "not used".

    Attributes:
        shuffle_caption: Put the tags that are not kept in random order.
        keep_tokens: Number of leading tags that keep their place and are never dropped.
        keep_tokens_separator: Text that marks the end of the kept tags (and, a second time, the start of a kept tail).
        secondary_separator: Text that binds tags together during shuffling; becomes ``caption_separator`` afterwards.
        caption_separator: What stands between two tags.
        enable_wildcard: Choose one of several lines, and one of ``{a|b|c}``.
        caption_prefix: Put before the caption, with a space.
        caption_suffix: Put behind the caption, with a space.
        caption_dropout_rate: Probability, 0..1, that the whole caption is left out.
        caption_dropout_every_n_epochs: Leave out all captions in every n-th epoch; 0 is never.
        caption_tag_dropout_rate: Probability, 0..1, that a single tag is left out.
        token_warmup_min: Number of tags at the start of the tag warm-up.
        token_warmup_step: Steps until all tags are used; below 1 a fraction of the run's steps.
    """

    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    caption_separator: str = ","
    enable_wildcard: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentRules:
    """What may happen to the pixels of an image when it is fetched.

    Attributes:
        flip_aug: Mirror half of the fetches.
        color_aug: Change hue and gamma a little.
        random_crop: Crop anywhere instead of in the middle.
        face_crop_aug_range: Range of the face crop's magnification.
    """

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRules:
    """Which image sizes the buckets may have, in pixels; the bounds are already multiples of ``bucket_reso_steps``.

    Attributes:
        enable_bucket: Sort images into buckets by aspect ratio; otherwise every image has the resolution.
        min_bucket_reso: Shortest side of a bucket.
        max_bucket_reso: Longest side of a bucket.
        bucket_reso_steps: Sides are multiples of this.
        bucket_no_upscale: Never enlarge an image; buckets follow the images.
    """

    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


def _no_attributes() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSpec:
    """One folder of images, or the images of one metadata file, and what is done with them.

    Attributes:
        image_dir: The folder, as it can be opened from the current directory.
        name: The folder's own name, or that of the metadata file; shown in metadata and messages.
        where: Where it was asked for: ``file:line`` or a flag.
        class_tokens: Caption of images without a caption file; None when there is none.
        is_reg: Regularisation images.
        num_repeats: How often an epoch holds each image (regularisation images: before balancing).
        caption_extension: Suffix of caption files, with its dot.
        captions: Caption rules.
        augment: Augmentation rules.
        resize_interpolation: Name of the resize filter; None chooses by scale.
        alpha_mask: The alpha channel weighs the loss.
        custom_attributes: Free values; nothing reads them, which a warning says.
        metadata_file: Captions and sizes from a JSON file instead of caption files.
        conditioning_data_dir: Folder of masks.
        cache_info: Keep captions and sizes of a folder's images in a file in it.
        written_dir: ``image_dir`` as it was written: how the paths in that file begin.
    """

    image_dir: Path
    name: str
    where: str
    class_tokens: str | None = None
    is_reg: bool = False
    num_repeats: int = 1
    caption_extension: str = ".caption"
    captions: CaptionRules = CaptionRules()
    augment: AugmentRules = AugmentRules()
    resize_interpolation: str | None = None
    alpha_mask: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=_no_attributes)
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    cache_info: bool = False
    written_dir: str = ""

    @property
    def folders_of_its_own(self) -> tuple[Path, ...]:
        """The folders that files may be written to: that of the images, and that of the metadata file."""
        return (self.image_dir,) if self.metadata_file is None else (self.image_dir, self.metadata_file.parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """Subsets that share a resolution, a batch size and buckets.

    Attributes:
        resolution: Training resolution; with buckets, its area is the largest a bucket may have.
        batch_size: Images per batch and process.
        buckets: Bucket rules.
        subsets: At least one; in the order they were asked for.
        network_multiplier: Strength of the adapter for this data set (carried along; 1.0 is normal).
        validation_split: Part, 0..1, of the images that is held out for validation; None leaves it to the options.
        validation_seed: Seed of that choice and of the noise in validation; None leaves it to the options.
        where: Where it was asked for.
    """

    resolution: Size
    batch_size: int
    buckets: BucketRules
    subsets: tuple[SubsetSpec, ...]
    network_multiplier: float = 1.0
    validation_split: float | None = None
    validation_seed: int | None = None
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """All data sets of a run.

    Attributes:
        datasets: At least one.
        where: The dataset file, or the flags, that describe them.
    """

    datasets: tuple[DatasetSpec, ...]
    where: str
