"""Latents of a folder of images, one file beside each, at the size that the metadata gives it.

The files are entries of the latent cache (:mod:`library.data.cache_entry`), which training uses as its own, under the
name that every program knows: ``<stem>.npz``. Where that name cannot be used, because images share a stem or the file
holds something else, they get the cache's own name.
"""

import logging
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from library.data.buckets import bucket_resolutions, place
from library.data.cache_entry import Source, UnusableEntryError, read_entry, write_entry
from library.data.disk_cache import DiskLatentCache, Verdict, entry_of, report
from library.data.folder_files import FolderFiles
from library.data.image_headers import UnreadableImageError
from library.data.images import ImageView, LoadedImage, load_image
from library.data.latent_encoding import Encode, Use, encoded
from library.data.records import ImageRecord
from library.data.setup import TrainingData, prepare_data
from library.data.spec import AugmentRules, BucketRules, DatasetSpec, DataSpec, Size, SubsetSpec, size_objection
from library.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the images are made into.

    Attributes:
        resolution: Training resolution.
        buckets: Bucket rules.
        flip: Mirrored latents, too.
        mask: The transparency, too.
    """

    resolution: Size
    buckets: BucketRules
    flip: bool
    mask: bool


def prepare(images: Sequence[Path], wanted: Wanted) -> tuple[TrainingData | None, dict[Path, str]]:
    """Give every image a bucket; None where no image can be used, and why images cannot.

    Args:
        images: The images.
        wanted: What they are made into.
    """
    resolutions = bucket_resolutions(wanted.resolution, wanted.buckets)
    folders: dict[Path, list[Path]] = {}
    for image in images:
        folders.setdefault(image.parent, []).append(image)
    sizes = {folder: FolderFiles(folder).sizes(image.name for image in found) for folder, found in folders.items()}
    records: list[ImageRecord] = []
    bad: dict[Path, str] = {}
    for image in images:
        size = sizes[image.parent][image.name]
        if isinstance(size, UnreadableImageError):
            bad[image] = str(size)
            continue
        try:
            bucket = place(size, wanted.resolution, wanted.buckets, resolutions).bucket
        except UserError as error:
            bad[image] = error.problems[0].what
            continue
        if objection := size_objection(bucket):
            bad[image] = f"its bucket would be {bucket[0]}x{bucket[1]} pixels: {objection}"
            continue
        records.append(_record(image, size, bucket))
    return (prepare_data(_spec(images[0].parent, wanted), records) if records else None), bad


def _record(image: Path, size: Size, bucket: Size) -> ImageRecord:
    # With its bucket said, the image is cropped as training crops it that reads the bucket from the metadata.
    return ImageRecord(
        folder=image.parent,
        name=image.name,
        size=size,
        caption="",
        has_caption_file=False,
        dataset=0,
        subset=0,
        is_reg=False,
        repeats=1,
        bucket=bucket,
    )


def _spec(folder: Path, wanted: Wanted) -> DataSpec:
    subset = SubsetSpec(
        image_dir=folder,
        name=folder.name,
        where="train_data_dir",
        augment=AugmentRules(flip_aug=wanted.flip),
        alpha_mask=wanted.mask,
    )
    dataset = DatasetSpec(resolution=wanted.resolution, batch_size=1, buckets=wanted.buckets, subsets=(subset,))
    return DataSpec(datasets=(dataset,), where="train_data_dir")


def fill(
    cache: DiskLatentCache,
    uses: Mapping[ImageView, Use],
    encode: Encode,
    *,
    batch_size: int,
    threads: int | None,
    keep_foreign: bool,
    is_main: bool,
    is_shared: bool,
) -> dict[Path, str]:
    """Make the latents of ``uses`` that are missing or not valid; an image that cannot be used is left out.

    Args:
        cache: What knows which latents are valid.
        uses: The share of this process.
        encode: The VAE's encoder.
        batch_size: Images encoded at once.
        threads: Threads that decode images ahead; a few when absent.
        keep_foreign: Keep files of other programs whose sizes fit.
        is_main: Show progress.
        is_shared: Whether other processes have shares, too.

    Returns:
        Images that cannot be used, and why.

    Raises:
        UserError: The latents cannot be written.
    """
    verdicts = cache.judge_all(uses, progress=is_main)
    if not keep_foreign:
        verdicts = {view: _without_foreign(verdict) for view, verdict in verdicts.items()}
    report(verdicts, is_shared=is_shared)
    pending = {view: uses[view] for view, verdict in verdicts.items() if verdict.path is None}
    replaced = [path for view in pending if (path := _target(cache, view)).exists()]
    if replaced:
        log.warning("%d files of latents that do not fit are replaced, for example %s", len(replaced), replaced[0])
    bad: dict[Path, str] = {}
    while pending:
        found = _encode_all(cache, pending, encode, batch_size=batch_size, threads=threads, progress=is_main)
        bad |= found
        pending = {view: use for view, use in pending.items() if view.path not in found}
    return bad


def _without_foreign(verdict: Verdict) -> Verdict:
    reason = "by another program; with --skip_existing it would be kept"
    return replace(verdict, path=None, is_foreign=False, reason=reason) if verdict.is_foreign else verdict


def _encode_all(
    cache: DiskLatentCache,
    pending: dict[ImageView, Use],
    encode: Encode,
    *,
    batch_size: int,
    threads: int | None,
    progress: bool,
) -> dict[Path, str]:
    """Encode until something goes wrong; what is done is taken out of ``pending``, what is bad is returned."""
    sources: dict[ImageView, Source] = {}

    def load(view: ImageView) -> LoadedImage:
        # Before the pixels are read, so that a change in between cannot be mistaken for what was encoded.
        with suppress(OSError):
            sources[view] = Source.of(view.path)
        return load_image(view)

    views = {str(view.path): view.path for view in pending}
    try:
        for view, posterior in encoded(
            dict(pending), encode, batch_size=batch_size, progress=progress, load=load, threads=threads
        ):
            entry = entry_of(view, posterior, cache.settings(view), sources.pop(view))
            write_entry(_target(cache, view), entry)
            del pending[view]
    except UserError as error:
        bad = {views[problem.where]: problem.what for problem in error.problems if problem.where in views}
        if not bad:
            raise
        return bad
    return {}


def _target(cache: DiskLatentCache, view: ImageView) -> Path:
    """Where the latents of ``view`` go."""
    found = cache.place(view)
    plain = view.path.with_suffix(".npz")
    is_free = plain in found.elsewhere and _may_replace(plain)
    return plain if is_free and not _is_foreign(found.shared) else found.shared


def _may_replace(path: Path) -> bool:
    """Whether ``path`` is free, holds latents, or is the rest of a file; not, if it is an archive of something else."""
    try:
        read_entry(path)
    except FileNotFoundError:
        return True
    except UnusableEntryError:
        return not zipfile.is_zipfile(path)
    return True


def _is_foreign(path: Path) -> bool:
    """Whether another program has written ``path``, which would be found before ours."""
    try:
        return read_entry(path).is_foreign
    except (FileNotFoundError, UnusableEntryError):
        return False
