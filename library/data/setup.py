"""The training set, ready to be planned and read: every image placed in a bucket, every repeat numbered."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

from library.data.buckets import Placement, aspect_error, bucket_resolutions, cover, place
from library.data.cache_places import Home
from library.data.captions import caption_for
from library.data.epoch_plan import EpochPlan, PlanBucket
from library.data.face_crop import Face, face_of
from library.data.images import ImageView
from library.data.latent_files import is_latent_file
from library.data.records import ImageRecord
from library.data.spec import AugmentRules, CaptionRules, DatasetSpec, DataSpec, Size, SubsetSpec
from library.errors import Problem, UserError, raise_if_any
from library.randomness import python_random

Reword: TypeAlias = Callable[[str, ImageRecord, Random], str]
"""Caption of one use of an image, its record and a generator -> the caption that is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetRules:
    """What a loader worker must know of a subset.

    Attributes:
        captions: Caption rules.
        augment: Augmentation rules.
        resize_interpolation: Name of the resize filter; None chooses by scale.
        alpha_mask: The alpha channel weighs the loss.
        home: Where latents of its images may be written.
    """

    captions: CaptionRules
    augment: AugmentRules
    resize_interpolation: str | None
    alpha_mask: bool = False
    home: Home = Home()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The examples of one data set that are trained at one size.

    Attributes:
        dataset: Position of the data set.
        resolution: Size in pixels.
        images: Number of images, repeats not counted.
        plan: The numbers of its examples, and the batch size.
    """

    dataset: int
    resolution: Size
    images: int
    plan: PlanBucket


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """All that is known of the training set before an image is decoded; it can be sent to another process.

    An *example* is an image and one of its repeats. Its number, its position in :attr:`examples`, is what randomness is
    keyed by: it depends on the order of data sets, subsets and relative paths alone.

    Attributes:
        records: The images, sorted by data set, subset and relative path.
        placements: The placement of each record.
        rules: The rules of each subset, by (data set, subset).
        examples: The position of each example's record in ``records``.
        buckets: The buckets in use, sorted by data set and size.
        reword: Changes captions after all caption rules; loader workers hold it, so it can be pickled.
    """

    records: tuple[ImageRecord, ...]
    placements: tuple[Placement, ...]
    rules: Mapping[tuple[int, int], SubsetRules]
    examples: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    reword: Reword | None = None

    def plan(self, seed: int, *, accumulation: int, world: int) -> EpochPlan:
        """The order of training for ``world`` processes that accumulate ``accumulation`` micro-batches a step."""
        return EpochPlan([bucket.plan for bucket in self.buckets], seed, accumulation, world)

    def rules_of(self, record: ImageRecord) -> SubsetRules:
        """The rules of the subset that ``record`` belongs to."""
        return self.rules[record.dataset, record.subset]

    def view(self, number: int) -> ImageView:
        """How the record at position ``number`` is read from its file."""
        record = self.records[number]
        interpolation = self.rules_of(record).resize_interpolation
        return ImageView(record.path, record.size, self.placements[number], interpolation)

    def caption(self, example: int, *, seed: int, epoch: int, step: int, total_steps: int) -> str:
        """The caption of ``example`` in ``epoch`` (from 1) at optimizer step ``step`` (from 0), as it is trained on."""
        record = self.records[self.examples[example]]
        rng = python_random(seed, "caption", epoch, example)
        rules = self.rules_of(record).captions
        caption = caption_for(record.caption, rules, rng, epoch=epoch, step=step, total_steps=total_steps)
        if self.reword is None:
            return caption
        return self.reword(caption, record, python_random(seed, "template", epoch, example))

    def face(self, number: int) -> Face | None:
        """The face that the crops of the record at position ``number`` follow; None where they do not."""
        record = self.records[number]
        if record.bucket is not None or self.rules_of(record).augment.face_crop_aug_range is None:
            return None
        return face_of(record.path.stem)

    @property
    def has_latent_files(self) -> bool:
        """Whether there are records with latents instead of an image."""
        return any(is_latent_file(record.name) for record in self.records)

    def masked_by_opacity(self, number: int) -> bool:
        """Whether the transparency of the record at position ``number`` is its mask."""
        record = self.records[number]
        return record.mask is None and self.rules_of(record).alpha_mask

    def home(self, number: int) -> Home:
        """Where latents of the record at position ``number`` may be written, and who says how large they are."""
        record = self.records[number]
        return replace(self.rules_of(record).home, is_sized=record.bucket is not None)

    def names(self, examples: Iterable[int]) -> list[str]:
        """The file names of ``examples``, for messages: without their folders."""
        return [self.records[self.examples[example]].path.name for example in examples]

    @property
    def train_examples(self) -> int:
        """Images x repeats of an epoch, regularisation images not counted."""
        return sum(record.repeats for record in self.records if not record.is_reg)

    @property
    def reg_examples(self) -> int:
        """Regularisation images x repeats of an epoch, after balancing."""
        return sum(record.repeats for record in self.records if record.is_reg)

    def mean_aspect_error(self, dataset: int) -> float:
        """Mean absolute difference of aspect ratio between images and buckets of a data set, repeats aside."""
        errors = [
            abs(aspect_error(record.size, placement))
            for record, placement in zip(self.records, self.placements, strict=True)
            if record.dataset == dataset
        ]
        return sum(errors) / len(errors) if errors else 0.0


def prepare_data(spec: DataSpec, records: Sequence[ImageRecord], *, reword: Reword | None = None) -> TrainingData:
    """Place ``records`` in the buckets of their data sets and number their repeats.

    Args:
        spec: The data sets.
        records: Their images, sorted by data set, subset and relative path.
        reword: Changes captions after all caption rules.

    Raises:
        UserError: There is nothing to train on, or images fit no bucket (all of them are named).
    """
    if not any(record.repeats for record in records):
        raise UserError("no images to train on", where=spec.where, remedy="Check the folders and the repeats.")
    placements = _placements(spec, records)
    examples = tuple(number for number, record in enumerate(records) for _ in range(record.repeats))
    return TrainingData(
        records=tuple(records),
        placements=placements,
        rules={
            (dataset_number, subset_number): SubsetRules(
                captions=subset.captions,
                augment=_effective(subset.augment, dataset),
                resize_interpolation=subset.resize_interpolation,
                alpha_mask=subset.alpha_mask,
                home=Home(subset.folders_of_its_own) if subset.metadata_file is not None else Home(),
            )
            for dataset_number, dataset in enumerate(spec.datasets)
            for subset_number, subset in enumerate(dataset.subsets)
        },
        examples=examples,
        buckets=_buckets(spec, records, placements, examples),
        reword=reword,
    )


def _effective(augment: AugmentRules, dataset: DatasetSpec) -> AugmentRules:
    """``augment`` without what buckets exclude."""
    return replace(augment, face_crop_aug_range=None) if dataset.buckets.enable_bucket else augment


def _placements(spec: DataSpec, records: Sequence[ImageRecord]) -> tuple[Placement, ...]:
    resolutions = [bucket_resolutions(dataset.resolution, dataset.buckets) for dataset in spec.datasets]
    known: dict[tuple[int, int, Size, Size | None], Placement] = {}
    placements: list[Placement] = []
    problems: list[Problem] = []
    for record in records:
        address = (record.dataset, record.subset, record.size, record.bucket)
        if address not in known:
            dataset = spec.datasets[record.dataset]
            subset = dataset.subsets[record.subset]
            try:
                known[address] = _placement(record, dataset, subset, resolutions[record.dataset])
            except UserError as error:
                problems += [Problem(problem.what, str(record.path), problem.remedy) for problem in error.problems]
                continue
        placements.append(known[address])
    raise_if_any(problems)
    return tuple(placements)


def _placement(record: ImageRecord, dataset: DatasetSpec, subset: SubsetSpec, resolutions: Sequence[Size]) -> Placement:
    resolution, size = dataset.resolution, record.size
    if record.bucket is not None:
        return Placement(record.bucket, cover(size, record.bucket))
    covers = size[0] >= resolution[0] and size[1] >= resolution[1]
    crops = subset.augment.random_crop or subset.augment.face_crop_aug_range is not None
    if covers and crops and not dataset.buckets.enable_bucket:
        # A random crop without buckets shows details of a large image at their own size; a crop around a face is drawn
        # anew each time.
        return Placement(resolution, size)
    return place(size, resolution, dataset.buckets, resolutions)


def _buckets(
    spec: DataSpec, records: Sequence[ImageRecord], placements: Sequence[Placement], examples: Sequence[int]
) -> tuple[Bucket, ...]:
    members: defaultdict[tuple[int, Size], list[int]] = defaultdict(list)
    for example, number in enumerate(examples):
        members[records[number].dataset, placements[number].bucket].append(example)
    images = Counter(
        (record.dataset, placement.bucket)
        for record, placement in zip(records, placements, strict=True)
        if record.repeats
    )
    return tuple(
        Bucket(
            dataset=dataset,
            resolution=resolution,
            images=images[dataset, resolution],
            plan=PlanBucket(tuple(members[dataset, resolution]), spec.datasets[dataset].batch_size),
        )
        for dataset, resolution in sorted(members)
    )
