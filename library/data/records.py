"""From folders to records: which images there are, how large they are, and what their captions say."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from library.data.caption_files import (
    CAPTION_SUFFIXES,
    NO_CAPTION_FILES,
    CaptionFile,
    UnreadableCaptionError,
    caption_name,
    index_names,
    read_caption,
)
from library.data.findings import Finding, Severity, error, warning
from library.data.folders import UNREAD_IMAGE_SUFFIXES, is_image
from library.data.image_headers import UnreadableImageError, displayed_size
from library.data.mask_files import find_masks, unused_masks
from library.data.metadata import DescribedImage, described_images, unlisted_images
from library.data.spec import DatasetSpec, DataSpec, Size, SubsetSpec

_MOST_NAMED: Final = 5
_NEAR_AREA: Final = 1.3
"""Buckets of one resolution differ in area by less than this factor."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file of the training set.

    Attributes:
        path: The file, as it can be opened from the current directory.
        size: Size as displayed (EXIF orientation applied), in pixels.
        caption: First line of the caption file, or all its lines when wildcards are on; else the class tokens; else "".
            With a metadata file, what that says.
        has_caption_file: Whether the caption came from a file.
        dataset: Position of its data set.
        subset: Position of its subset within the data set.
        is_reg: A regularisation image.
        repeats: How often an epoch holds it, at least 1, after regularisation images were balanced.
        tags: Its tags alone, where a metadata file tells them apart from the caption.
        bucket: Size to train it at, where a metadata file decides that.
        mask: Image of what each of its pixels weighs in the loss.
    """

    path: Path
    size: Size
    caption: str
    has_caption_file: bool
    dataset: int
    subset: int
    is_reg: bool
    repeats: int
    tags: str | None = None
    bucket: Size | None = None
    mask: Path | None = None


def scan(spec: DataSpec) -> tuple[tuple[ImageRecord, ...], tuple[Finding, ...]]:
    """Every image that an epoch holds, and what is wrong with files on the way.

    Images that cannot be read, and regularisation images that balancing leaves over, have a finding and no record. The
    order is (data set, subset, file name), whatever order the file system has.
    """
    findings: list[Finding] = []
    sizes: dict[Path, Size | None] = {}
    records: list[ImageRecord] = []
    for number, dataset in enumerate(spec.datasets):
        of_dataset = [
            record
            for position, subset in enumerate(dataset.subsets)
            for record in _scan_subset(subset, (number, position), sizes, findings)
        ]
        of_dataset = _with_sizes_of_metadata(of_dataset, dataset, findings)
        records.extend(_balanced(of_dataset, dataset, findings))
    subsets = [subset for dataset in spec.datasets for subset in dataset.subsets]
    findings.extend(unused_masks(subsets, {record.mask for record in records if record.mask is not None}))
    described = [subset for subset in subsets if subset.metadata_file is not None]
    if described:
        used = {record.path for record in records}
        findings.extend(finding for subset in described for finding in unlisted_images(subset, used))
    return tuple(records), tuple(dict.fromkeys(findings))


def _scan_subset(
    subset: SubsetSpec, position: tuple[int, int], sizes: dict[Path, Size | None], findings: list[Finding]
) -> Iterator[ImageRecord]:
    """The records of one subset. ``sizes`` remembers images (None: unreadable) that other data sets share."""
    images, image_findings = _images_in_folder(subset) if subset.metadata_file is None else described_images(subset)
    findings.extend(image_findings)
    masks, mask_findings = find_masks([image.path for image in images], subset)
    findings.extend(mask_findings)
    damaged: list[Finding] = []
    for image, mask in zip(images, masks, strict=True):
        path = image.path
        if path not in sizes:
            sizes[path] = _size_or_finding(path, damaged)
        size = sizes[path]
        if size is None:
            continue
        yield ImageRecord(
            path=path,
            size=size,
            caption=subset.class_tokens or "" if image.caption is None else image.caption,
            has_caption_file=image.caption is not None,
            dataset=position[0],
            subset=position[1],
            is_reg=subset.is_reg,
            repeats=subset.num_repeats,
            tags=image.tags,
            bucket=image.bucket,
            mask=mask,
        )
    findings.extend(_shortened(damaged, "images that cannot be read", subset))


def _images_in_folder(subset: SubsetSpec) -> tuple[list[DescribedImage], list[Finding]]:
    """The images of a folder with what the caption files beside them say."""
    names = _file_names(subset.image_dir)
    images = sorted(name for name in names if is_image(name))
    captions, findings = _read_captions(images, names, subset)
    texts = {name: caption.text for name, caption in captions.items()}
    described = [DescribedImage(subset.image_dir / name, texts.get(name)) for name in images]
    return described, [*_unread_formats(names, subset), *findings]


def _with_sizes_of_metadata(
    records: list[ImageRecord], dataset: DatasetSpec, findings: list[Finding]
) -> list[ImageRecord]:
    """``records``, trained at the sizes that metadata files give unless the data set's rules exclude that."""
    sizes = {record.bucket for record in records if record.bucket}
    if not sizes:
        return records
    if dataset.buckets.bucket_no_upscale:
        what = "train_resolution in the metadata is not used: with bucket_no_upscale the images decide their buckets"
        findings.append(warning(what, dataset.where, "Leave out bucket_no_upscale to use it."))
        return [replace(record, bucket=None) for record in records]
    area = dataset.resolution[0] * dataset.resolution[1]
    largest = max(sizes, key=lambda size: size[0] * size[1])
    if not area / _NEAR_AREA <= largest[0] * largest[1] <= area * _NEAR_AREA:
        findings.append(
            warning(
                f"the metadata says to train at up to {largest[0]}x{largest[1]}, and that is done, although the "
                f"resolution is {dataset.resolution[0]}x{dataset.resolution[1]}",
                dataset.where,
                "Remove train_resolution from the metadata to follow the resolution.",
            )
        )
    return records


def _file_names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _size_or_finding(path: Path, findings: list[Finding]) -> Size | None:
    try:
        return displayed_size(path)
    except UnreadableImageError as problem:
        remedy = "Replace the file with a whole copy, or remove it."
        findings.append(error(f"the image cannot be read: {problem}", str(path), remedy))
        return None


def _unread_formats(names: Sequence[str], subset: SubsetSpec) -> Iterator[Finding]:
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in names)
    for suffix in sorted(UNREAD_IMAGE_SUFFIXES & suffixes.keys()):
        yield warning(
            f"{suffixes[suffix]} {suffix} files in '{subset.name}' are not trained on: the format is not read",
            subset.where,
            "Convert them to .png or .jpg.",
        )


def _read_captions(
    images: Sequence[str], names: Sequence[str], subset: SubsetSpec
) -> tuple[dict[str, CaptionFile], list[Finding]]:
    """The caption of each image that has a caption file, by image name."""
    index = index_names(names)
    captions: dict[str, CaptionFile] = {}
    broken: list[Finding] = []
    without: list[str] = []
    for image in images:
        name = caption_name(image, subset.caption_extension, index)
        if name is None:
            without.append(image)
            continue
        path = subset.image_dir / name
        try:
            captions[image] = read_caption(path, all_lines=subset.captions.enable_wildcard)
        except (UnreadableCaptionError, OSError) as problem:
            remedy = "Open the file in an editor and save it with the encoding UTF-8."
            broken.append(error(f"the caption cannot be read: {problem}", str(path), remedy))
    findings = [*_shortened(broken, "captions that cannot be read", subset), *_judge_captions(captions, subset)]
    if without and not broken and captions:
        findings.append(_some_captions_missing(without, len(images), subset))
    elif without and not broken:
        findings.extend(_no_captions(without, index, subset))
    return captions, findings


def _judge_captions(captions: Mapping[str, CaptionFile], subset: SubsetSpec) -> Iterator[Finding]:
    empty = [image for image, caption in captions.items() if not caption.text]
    if empty:
        yield warning(
            f"{len(empty)} caption files in '{subset.name}' are empty or begin with an empty line: {_named(empty)}",
            subset.where,
            "Write a caption, or remove the files so that the class tokens are used.",
        )
    longer = [image for image, caption in captions.items() if caption.lines > 1]
    if longer and not subset.captions.enable_wildcard:
        yield warning(
            f"{len(longer)} caption files in '{subset.name}' have several lines, and only the first is used: "
            f"{_named(longer)}",
            subset.where,
            "Write one line, or set enable_wildcard = true to choose a line at random each time.",
        )


def _some_captions_missing(without: Sequence[str], count: int, subset: SubsetSpec) -> Finding:
    return warning(
        f"{len(without)} of {count} images in '{subset.name}' have no {subset.caption_extension} file and are trained "
        f"with {_fallback(subset)}: {_named(without)}",
        subset.where,
        "Write the missing captions, or leave it so if it is meant.",
    )


def _no_captions(images: Sequence[str], index: Mapping[str, str], subset: SubsetSpec) -> Iterator[Finding]:
    """No image has a caption file: a mistake where files of another extension lie beside them."""
    if subset.caption_extension.startswith(NO_CAPTION_FILES):
        return
    extension, count = _other_captions(images, index)
    if count:
        is_likely_meant = subset.is_reg and bool(subset.class_tokens)
        severity: Severity = "warning" if is_likely_meant else "error"
        yield Finding(
            severity,
            f"no {subset.caption_extension} files in '{subset.name}', but {extension} files beside {count} of "
            f"{len(images)} images: they would be trained with {_fallback(subset)}",
            subset.where,
            f"Did you mean --caption_extension={extension} (caption_extension = '{extension}' in a dataset file)? "
            f"To train without caption files, use {NO_CAPTION_FILES}.",
        )
    elif not subset.class_tokens:
        yield warning(
            f"no captions in '{subset.name}' and no class tokens: the caption of {len(images)} images is empty",
            subset.where,
            f"Write {subset.caption_extension} files, or give class_tokens.",
        )


def _other_captions(images: Sequence[str], index: Mapping[str, str]) -> tuple[str, int]:
    """The commonest extension of text files beside the images, and beside how many of them it stands."""
    found = Counter(
        extension
        for image in images
        for suffix in CAPTION_SUFFIXES
        for extension in (suffix, os.path.splitext(image)[1] + suffix)
        if caption_name(image, extension, index) is not None
    )
    return found.most_common(1)[0] if found else ("", 0)


def _fallback(subset: SubsetSpec) -> str:
    return f"the class tokens '{subset.class_tokens}'" if subset.class_tokens else "an empty caption"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _shortened(findings: list[Finding], kind: str, subset: SubsetSpec) -> list[Finding]:
    """The first few of many alike, and one that counts the rest."""
    if len(findings) <= _MOST_NAMED:
        return findings
    rest = [Path(finding.where).name for finding in findings[_MOST_NAMED:]]
    remedy = findings[0].remedy
    return [*findings[:_MOST_NAMED], error(f"{len(rest)} more {kind}: {_named(rest)}", str(subset.image_dir), remedy)]


def _balanced(records: Sequence[ImageRecord], dataset: DatasetSpec, findings: list[Finding]) -> list[ImageRecord]:
    """The records of one data set with its regularisation images balanced against the others."""
    train = sum(record.repeats for record in records if not record.is_reg)
    regularisation = [record for record in records if record.is_reg]
    repeats = iter(balance_regularisation(train, [record.repeats for record in regularisation]))
    balanced = [replace(record, repeats=next(repeats)) if record.is_reg else record for record in records]
    unused = sum(record.repeats == 0 for record in balanced)
    if unused and train:
        wanted = sum(record.repeats for record in regularisation)
        findings.append(
            warning(
                f"{unused} of {len(regularisation)} regularisation images are not used: an epoch holds {train} "
                "training images (repeats counted) and needs no more",
                dataset.where,
                f"Raise num_repeats of the training images about {-(-wanted // train)} times to use them all.",
            )
        )
    return [record for record in balanced if record.repeats > 0]


def balance_regularisation(train: int, repeats: Sequence[int]) -> tuple[int, ...]:
    """How often an epoch holds each regularisation image so that together they weigh what the training images do.

    A first pass takes each image with its own repeats until there are at least ``train``; further passes add one repeat
    to each image in turn until there are.

    Args:
        train: Training images in an epoch, repeats counted.
        repeats: Each regularisation image's own repeats, in record order.

    Returns:
        Repeats in the same order; 0 for an image that is not used.
    """
    result = [0] * len(repeats)
    total = 0
    while repeats and total < train:
        for index, own in enumerate(repeats):
            added = own if result[index] == 0 else 1
            result[index] += added
            total += added
            if total >= train:
                break
    return tuple(result)
