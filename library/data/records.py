"""From folders to records: which images there are, how large they are, and what their captions say."""

import gc
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final, TypeAlias

from library.data.caption_files import (
    CAPTION_SUFFIXES,
    NO_CAPTION_FILES,
    caption_in,
    caption_name,
    caption_names,
    index_names,
)
from library.data.findings import Finding, Severity, error, warning
from library.data.folder_files import FolderFiles
from library.data.folders import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES
from library.data.image_headers import UnreadableImageError
from library.data.info_file import info_of, keep_info
from library.data.latent_files import is_latent_file
from library.data.mask_files import find_masks, unused_masks
from library.data.metadata import DescribedImage, described_images, unlisted_images
from library.data.spec import DatasetSpec, DataSpec, Size, SubsetSpec
from library.data.unreadable import unreadable_caption, unreadable_image
from library.wording import named

_Image: TypeAlias = tuple[Path, str, Size | UnreadableImageError, str | None, str | None, Size | None]
"""Folder, file name, displayed size or why there is none, caption, tags, size to train at."""

_MOST_NAMED: Final = 5
_MOST_EXAMPLES: Final = 50_000_000
"""In an epoch, whose order is kept in memory."""

_NEAR_AREA: Final = 1.3
"""Buckets of one resolution differ in area by less than this factor."""


# Not frozen: a frozen object of as many fields takes several times as long to make, and large sets have many.
@dataclass(slots=True, unsafe_hash=True)
class ImageRecord:
    """One image file of the training set; nobody changes one.

    Attributes:
        folder: The folder it lies in, as it can be opened from the current directory.
        name: Its file name.
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

    folder: Path
    name: str
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

    @property
    def path(self) -> Path:
        """The file, as it can be opened from the current directory."""
        # Made when it is asked for: of a large set that costs more than everything else about a record.
        return self.folder / self.name


def scan(spec: DataSpec) -> tuple[tuple[ImageRecord, ...], tuple[Finding, ...]]:
    """Every image that an epoch holds, and what is wrong with files on the way.

    Images that cannot be read, and regularisation images that balancing leaves over, have a finding and no record. The
    order is (data set, subset, file name), whatever order the file system has.
    """
    folders = _Folders()
    try:
        with _without_collection():
            return _scan(spec, folders)
    finally:
        # What was read is kept even where somebody stops a long scan.
        folders.remember()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from looking for cycles: among many new objects that all stay, it looks often and finds none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _scan(spec: DataSpec, folders: "_Folders") -> tuple[tuple[ImageRecord, ...], tuple[Finding, ...]]:
    findings: list[Finding] = []
    records: list[ImageRecord] = []
    for number, dataset in enumerate(spec.datasets):
        of_dataset = [
            record
            for position, subset in enumerate(dataset.subsets)
            for record in _scan_subset(subset, (number, position), folders, findings)
        ]
        of_dataset = _with_sizes_of_metadata(of_dataset, dataset, findings)
        records.extend(_balanced(of_dataset, dataset, findings))
    count = sum(record.repeats for record in records)
    if count > _MOST_EXAMPLES:
        what = f"an epoch would have {count:,} images, repeats counted; at most {_MOST_EXAMPLES:,} can be handled"
        findings.append(error(what, spec.where, "Lower num_repeats, or the number that a folder's name begins with."))
        records = []
    subsets = [subset for dataset in spec.datasets for subset in dataset.subsets]
    findings.extend(unused_masks(subsets, {record.mask for record in records if record.mask is not None}))
    described = [subset for subset in subsets if subset.metadata_file is not None]
    if described:
        used = {record.path for record in records}
        findings.extend(finding for subset in described for finding in unlisted_images(subset, used))
    return tuple(records), tuple(dict.fromkeys(findings))


class _Folders:
    """The folders of a scan, each listed once, whatever data sets share it."""

    def __init__(self) -> None:
        self._by_name: dict[str, FolderFiles] = {}
        self._asked: set[Path] = set()

    def of(self, folder: str | Path) -> FolderFiles:
        """The files of ``folder``."""
        name = str(folder)
        if name not in self._by_name:
            self._by_name[name] = FolderFiles(Path(folder))
        return self._by_name[name]

    def sizes(self, images: Sequence[DescribedImage]) -> list[Size | UnreadableImageError]:
        """The displayed size of each image, or why it cannot be read."""
        places = [_split(str(image.path)) for image in images]
        names: defaultdict[str, list[str]] = defaultdict(list)
        for (folder, name), image in zip(places, images, strict=True):
            if image.size is None:
                names[folder].append(name)
        sizes = {folder: self.of(folder).sizes(of_folder) for folder, of_folder in names.items()}
        return [image.size or sizes[folder][name] for (folder, name), image in zip(places, images, strict=True)]

    def is_first(self, folder: Path) -> bool:
        """Whether this is asked of ``folder`` for the first time."""
        known = len(self._asked)
        self._asked.add(folder)
        return len(self._asked) > known

    def remember(self) -> None:
        """Keep what was read for the next run."""
        for files in self._by_name.values():
            files.remember()


def _split(path: str) -> tuple[str, str]:
    """Folder and name; quicker than :func:`os.path.split` where a path is written as :class:`Path` does."""
    folder, _, name = path.rpartition(os.sep)
    return (folder, name) if folder else os.path.split(path)


def _scan_subset(
    subset: SubsetSpec, position: tuple[int, int], folders: _Folders, findings: list[Finding]
) -> Iterator[ImageRecord]:
    """The records of one subset."""
    if subset.metadata_file is None:
        images, image_findings = _images_in_folder(subset, folders.of(subset.image_dir))
    else:
        images, image_findings = _images_of_metadata(subset, folders)
    findings.extend(image_findings)
    masks: Sequence[Path | None] = [None] * len(images)
    if subset.conditioning_data_dir is not None:
        masks, mask_findings = find_masks([image[0] / image[1] for image in images], subset)
        findings.extend(mask_findings)
    damaged: list[Finding] = []
    fallback, (dataset, number) = subset.class_tokens or "", position
    is_reg, repeats = subset.is_reg, subset.num_repeats
    for (folder, name, size, caption, tags, bucket), mask in zip(images, masks, strict=True):
        if isinstance(size, UnreadableImageError):
            damaged.append(unreadable_image(folder / name, size))
            continue
        yield ImageRecord(
            folder=folder,
            name=name,
            size=size,
            caption=fallback if caption is None else caption,
            has_caption_file=caption is not None,
            dataset=dataset,
            subset=number,
            is_reg=is_reg,
            repeats=repeats,
            tags=tags,
            bucket=bucket,
            mask=mask,
        )
    findings.extend(_shortened(damaged, "images that cannot be read", subset))
    if images and subset.cache_info and subset.metadata_file is None and folders.is_first(subset.image_dir):
        read = [
            (name, fallback if caption is None else caption, size)
            for _, name, size, caption, *_ in images
            if isinstance(size, tuple)
        ]
        findings.extend(keep_info(subset.image_dir, info_of(subset.written_dir, read)))


def _images_of_metadata(subset: SubsetSpec, folders: _Folders) -> tuple[list[_Image], list[Finding]]:
    """The images of a metadata file."""
    described, findings = described_images(subset)
    sizes = folders.sizes(described)
    images = [
        (image.path.parent, image.path.name, size, image.caption, image.tags, image.bucket)
        for image, size in zip(described, sizes, strict=True)
    ]
    return images, findings


def _images_in_folder(subset: SubsetSpec, files: FolderFiles) -> tuple[list[_Image], list[Finding]]:
    """The images of a folder with what the caption files beside them say."""
    by_suffix = files.by_suffix()
    images = sorted(chain.from_iterable(names for suffix, names in by_suffix.items() if suffix in IMAGE_SUFFIXES))
    captions, findings = _read_captions(images, files, subset)
    sizes = files.sizes(images)
    folder = subset.image_dir
    found: list[_Image] = [(folder, name, sizes[name], captions.get(name), None, None) for name in images]
    return found, [*_unread_formats(by_suffix, subset), *findings]


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
        return [record if is_latent_file(record.name) else replace(record, bucket=None) for record in records]
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


def _unread_formats(by_suffix: Mapping[str, Sequence[str]], subset: SubsetSpec) -> Iterator[Finding]:
    for suffix in sorted(UNREAD_IMAGE_SUFFIXES.intersection(by_suffix)):
        yield warning(
            f"{len(by_suffix[suffix])} {suffix} files in '{subset.name}' are not trained on: the format is not read",
            subset.where,
            "Convert them to .png or .jpg.",
        )


def _read_captions(
    images: Sequence[str], files: FolderFiles, subset: SubsetSpec
) -> tuple[dict[str, str], list[Finding]]:
    """The caption of each image that has a caption file, by image name."""
    names = caption_names(images, subset.caption_extension, files.names)
    texts = files.texts(name for name in names.values() if name is not None)
    captions: dict[str, str] = {}
    broken: list[Finding] = []
    without: list[str] = []
    longer: list[str] = []
    for image, name in names.items():
        if name is None:
            without.append(image)
        elif isinstance(text := texts[name], str):
            captions[image], lines = caption_in(text, all_lines=subset.captions.enable_wildcard)
            if lines > 1:
                longer.append(image)
        else:
            broken.append(unreadable_caption(subset.image_dir / name, text))
    findings = [*_shortened(broken, "captions that cannot be read", subset), *_judge_captions(captions, longer, subset)]
    if without and not broken and captions:
        findings.append(_some_captions_missing(without, len(images), subset))
    elif without and not broken:
        findings.extend(_no_captions(without, index_names(files.names), subset))
    return captions, findings


def _judge_captions(captions: Mapping[str, str], longer: Sequence[str], subset: SubsetSpec) -> Iterator[Finding]:
    """What is remarkable about captions by image name, those of ``longer`` from files of several lines."""
    empty = [image for image, caption in captions.items() if not caption]
    if empty:
        yield warning(
            f"{len(empty)} caption files in '{subset.name}' are empty or begin with an empty line: "
            f"{named(empty, _MOST_NAMED)}",
            subset.where,
            "Write a caption, or remove the files so that the class tokens are used.",
        )
    if longer and not subset.captions.enable_wildcard:
        yield warning(
            f"{len(longer)} caption files in '{subset.name}' have several lines, and only the first is used: "
            f"{named(longer, _MOST_NAMED)}",
            subset.where,
            "Write one line, or set enable_wildcard = true to choose a line at random each time.",
        )


def _some_captions_missing(without: Sequence[str], count: int, subset: SubsetSpec) -> Finding:
    return warning(
        f"{len(without)} of {count} images in '{subset.name}' have no {subset.caption_extension} file and are trained "
        f"with {_fallback(subset)}: {named(without, _MOST_NAMED)}",
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


def _shortened(findings: list[Finding], kind: str, subset: SubsetSpec) -> list[Finding]:
    """The first few of many alike, and one that counts the rest."""
    if len(findings) <= _MOST_NAMED:
        return findings
    rest = [Path(finding.where).name for finding in findings[_MOST_NAMED:]]
    remedy = findings[0].remedy
    what = f"{len(rest)} more {kind}: {named(rest, _MOST_NAMED)}"
    return [*findings[:_MOST_NAMED], error(what, str(subset.image_dir), remedy)]


def _balanced(records: Sequence[ImageRecord], dataset: DatasetSpec, findings: list[Finding]) -> list[ImageRecord]:
    """The records of one data set with its regularisation images balanced against the others."""
    regularisation = [record for record in records if record.is_reg]
    if not regularisation:
        return list(records)
    train = sum(record.repeats for record in records if not record.is_reg)
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
    for index, own in enumerate(repeats):
        if total >= train:
            return tuple(result)
        result[index] = own
        total += own
    passes, rest = divmod(max(train - total, 0), len(repeats) or 1)
    return tuple(count + passes + (index < rest) for index, count in enumerate(result))
