"""Mistakes in a training set that no single file shows: empty folders, odd sizes, captions and regularisation.

Each finding says what was found, where it was asked for, and what to do. Errors stop the run before training.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from library.data.buckets import Placement, bucket_resolutions, place
from library.data.face_crop import face_of
from library.data.findings import Finding, error, warning
from library.data.folders import explain_image_dir
from library.data.lint_captions import lint_captions, lint_rules
from library.data.mask_files import lint_masks
from library.data.records import ImageRecord
from library.data.spec import DatasetSpec, DataSpec, Size, SubsetSpec, size_text
from library.errors import UserError
from library.wording import named

__all__ = ["Finding", "lint"]

_MOST_NAMED: Final = 5
_MOST_ENLARGED: Final = 2.0
_MOST_CROPPED: Final = 0.3
_MOST_REPEATS: Final = 1000
_MOST_REGULARISATION_REPEATS: Final = 20
_HUGE_SIDE: Final = 4096
_HUGE_FACTOR: Final = 30


def lint(spec: DataSpec, records: Sequence[ImageRecord]) -> list[Finding]:
    """What is wrong or remarkable about the data sets.

    Args:
        spec: The data sets, possibly with errors that were reported already.
        records: Their images.
    """
    findings: list[Finding] = []
    for number, dataset in enumerate(spec.datasets):
        own = [record for record in records if record.dataset == number]
        for position, subset in enumerate(dataset.subsets):
            images = [record for record in own if record.subset == position]
            findings.extend(_lint_subset(subset, images))
            findings.extend(lint_masks(subset, images))
            findings.extend(_lint_sizes(dataset, subset, [record for record in images if record.bucket is None]))
        findings.extend(_lint_regularisation(dataset, own))
        findings.extend(_lint_batches(dataset, own))
    return findings


def _lint_subset(subset: SubsetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    named_by_flag = subset.where.startswith("--")
    setting = "a folder '{}'" if named_by_flag else "image_dir = '{}'"
    # The keys of a metadata file may lead anywhere; those that lead nowhere were named with the records.
    if subset.metadata_file is None and (advice := explain_image_dir(subset.image_dir, setting=setting)):
        remedy = advice.remedy
        if named_by_flag:
            remedy = f"Put the images directly into '{subset.image_dir}', or remove that folder."
        yield error(advice.what, subset.where, remedy)
        return
    if subset.num_repeats > _MOST_REPEATS:
        yield warning(
            f"num_repeats {subset.num_repeats} for '{subset.name}': an epoch holds each of its images that often",
            subset.where,
            "For longer training raise the number of steps or epochs instead.",
        )
    if not subset.is_reg:
        yield from lint_captions(subset, records)
        yield from lint_rules(subset)


def _lint_sizes(dataset: DatasetSpec, subset: SubsetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    if not dataset.buckets.enable_bucket:
        yield from _lint_equal_sizes(dataset.resolution, subset, records)
        return
    if subset.augment.face_crop_aug_range is not None:
        yield warning(
            f"face_crop_aug_range has no effect with buckets (images '{subset.name}')",
            subset.where,
            "Leave it out, or train without buckets.",
        )
    placements, findings = _place(dataset, records)
    yield from findings
    # Many images have few sizes, so each size is judged once.
    blurred = {size for size, placement in placements.items() if _enlargement(size, placement) > _MOST_ENLARGED}
    enlarged = [record for record in records if record.size in blurred] if blurred else []
    if enlarged:
        yield warning(
            f"{len(enlarged)} of {len(records)} images in '{subset.name}' are enlarged more than twice and blur: "
            f"{_sized(enlarged)}",
            subset.where,
            "Use larger images, a lower resolution, or bucket_no_upscale.",
        )
    extreme = {size for size, placement in placements.items() if placement.crop_loss > _MOST_CROPPED}
    cropped = [record for record in records if record.size in extreme] if extreme else []
    if cropped:
        yield warning(
            f"{len(cropped)} of {len(records)} images in '{subset.name}' fit no bucket well and lose more than "
            f"{_MOST_CROPPED:.0%} of their area: {_sized(cropped)}",
            subset.where,
            "Crop them to a less extreme shape, or use a lower min_bucket_reso and a higher max_bucket_reso.",
        )

    area = dataset.resolution[0] * dataset.resolution[1]
    slow = {size for size in {record.size for record in records} if _is_huge(size, area)}
    huge = [record for record in records if record.size in slow] if slow else []
    if huge:
        yield warning(
            f"{len(huge)} of {len(records)} images in '{subset.name}' are huge for this resolution and slow to read: "
            f"{_sized(huge)}",
            subset.where,
            "Shrink them once, to about twice the resolution, or give --cache_latents.",
        )


def _is_huge(size: Size, area: int) -> bool:
    return max(size) > _HUGE_SIDE and size[0] * size[1] > _HUGE_FACTOR * area


def _place(dataset: DatasetSpec, records: Sequence[ImageRecord]) -> tuple[dict[Size, Placement], list[Finding]]:
    """The placement of each size, and what fits no bucket."""
    placements: dict[Size, Placement] = {}
    findings: list[Finding] = []
    resolutions = bucket_resolutions(dataset.resolution, dataset.buckets)
    if any(0 in size for size in resolutions):
        # Only with bucket bounds that are refused anyway.
        return placements, findings
    for record in records:
        if record.size in placements:
            continue
        try:
            placements[record.size] = place(record.size, dataset.resolution, dataset.buckets, resolutions)
        except UserError as problem:
            first = problem.problems[0]
            findings.append(error(first.what, str(record.path), first.remedy or "Remove the image."))
    return placements, findings


def _enlargement(size: Size, placement: Placement) -> float:
    return max(placement.resized[0] / size[0], placement.resized[1] / size[1])


def _lint_equal_sizes(resolution: Size, subset: SubsetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    """Without buckets an image has the resolution, or becomes it; a larger one may be cropped at random."""
    crops_faces = subset.augment.face_crop_aug_range is not None
    has_face = [crops_faces and face_of(record.path.stem) is not None for record in records]
    if crops_faces and records and not any(has_face):
        yield warning(
            f"face_crop_aug_range is set, but no image in '{subset.name}' has the place of a face in its name",
            subset.where,
            "Name the images name_cx_cy_w_h (centre and size of the face in pixels), or leave out face_crop_aug_range.",
        )

    def fits(size: Size, is_cropped: bool) -> bool:
        covers = size[0] >= resolution[0] and size[1] >= resolution[1]
        return size == resolution or (is_cropped and covers)

    wrong = [
        record
        for record, face in zip(records, has_face, strict=True)
        if not fits(record.size, subset.augment.random_crop or face)
    ]
    if not wrong:
        return
    yield warning(
        f"{len(wrong)} of {len(records)} images in '{subset.name}' are not {resolution[0]}x{resolution[1]}, and are "
        f"resized or cropped to it: {_sized(wrong)}",
        subset.where,
        "To keep their shapes, give --enable_bucket (enable_bucket = true in a dataset file).",
    )


def _lint_batches(dataset: DatasetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    """Batches that are never full because there are too few images, or too few of one shape."""
    if not records:
        return
    total = sum(record.repeats for record in records)
    if total < dataset.batch_size:
        yield warning(
            f"batch_size {dataset.batch_size} is never reached: an epoch holds {total} images (repeats counted)",
            dataset.where,
            f"Lower batch_size to {total} or less, or use more images or repeats.",
        )
        return
    placements, _ = _place(dataset, [record for record in records if record.bucket is None])
    counts: Counter[Size] = Counter()
    for (bucket, size, repeats), images in Counter((one.bucket, one.size, one.repeats) for one in records).items():
        bucket = bucket or (placements[size].bucket if size in placements else None)
        if bucket is not None:
            counts[bucket] += repeats * images
    small = [(size, count) for size, count in sorted(counts.items()) if count < dataset.batch_size]
    if small and dataset.buckets.enable_bucket:
        sizes = [f"{size_text(size)} ({count})" for size, count in small]
        yield warning(
            f"{len(small)} of {len(counts)} buckets hold fewer images (repeats counted) than batch_size "
            f"{dataset.batch_size}, so their batches are smaller: {named(sizes, _MOST_NAMED)}",
            dataset.where,
            "They are trained all the same; for full batches crop images to common shapes, or raise their repeats.",
        )


def _lint_regularisation(dataset: DatasetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    if dataset.subsets and all(subset.is_reg for subset in dataset.subsets):
        yield error(
            "there are only regularisation images",
            dataset.where,
            "Add the images to train on: is_reg = true and --reg_data_dir are for images of the class in general.",
        )
        return
    train = sum(record.repeats for record in records if not record.is_reg)
    regularisation = [record for record in records if record.is_reg]
    if not regularisation or not train:
        return
    used = sum(record.repeats for record in regularisation)
    most = max(record.repeats for record in regularisation)
    if most > _MOST_REGULARISATION_REPEATS:
        yield warning(
            f"{len(regularisation)} regularisation images are repeated up to {most} times to balance {train} training "
            "images (repeats counted)",
            dataset.where,
            "Use more regularisation images, or fewer repeats of the training images.",
        )
    if used > 2 * train:
        yield warning(
            f"an epoch holds {used} regularisation images and only {train} training images (repeats counted)",
            dataset.where,
            "Lower num_repeats of the regularisation images, usually to 1.",
        )


def _sized(records: Sequence[ImageRecord]) -> str:
    """The first names with their sizes, and how many more there are."""
    return named([f"{record.name} {size_text(record.size)}" for record in records], _MOST_NAMED)
