"""Images held out of training, on which it is measured: which they are, and how they are read.

A held-out image is read the same way every time: no dropout, no shuffling, no mirroring, no random crop or colour, once
an epoch whatever its repeats. Regularisation images are never held out.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from library.data.captions import caption_for
from library.data.findings import Finding, error, warning
from library.data.options import ValidationOptions
from library.data.records import ImageRecord, balance_regularisation
from library.data.spec import AugmentRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec
from library.randomness import key, python_random
from library.wording import named

DEFAULT_SEED: Final = 0
"""Not the seed of the run: runs with other seeds hold out the same images, and one that is resumed does, too."""
_MOST_NAMED: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The images to validate on.

    Attributes:
        spec: The data sets as validation reads them, in the places that they have in training.
        records: The held-out images, sorted as those of the training set; their captions are final.
    """

    spec: DataSpec
    records: tuple[ImageRecord, ...]

    def seed(self, record: ImageRecord) -> int:
        """What the noise of ``record`` is keyed by, beside the image."""
        return self.spec.datasets[record.dataset].validation_seed or DEFAULT_SEED

    def image_key(self, record: ImageRecord) -> int:
        """The number that stands for the image of ``record`` in keys: it depends on the relative path alone."""
        return key("image", relative_name(record, self.spec.datasets[record.dataset].subsets[record.subset]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A training set after images were held out.

    Attributes:
        training: What is trained on.
        held_out: What is validated on; None where nothing is.
        findings: What is wrong or remarkable.
    """

    training: tuple[ImageRecord, ...]
    held_out: HeldOut | None = None
    findings: tuple[Finding, ...] = ()


def hold_out(spec: DataSpec, records: Sequence[ImageRecord], options: ValidationOptions) -> Split:
    """Hold images out as the data sets and, where they do not say it, the options ask for.

    Of each subset with n images, round(n * split) are held out, but at least one if n > 1. Which, depends on the seed
    and their relative paths alone. A file that is held out is not trained on in any data set.

    Args:
        spec: The data sets.
        records: Their images, sorted by data set, subset and relative path.
        options: Split and seed of data sets that have none of their own.
    """
    given = spec
    spec = replace(given, datasets=tuple(_settled(dataset, options) for dataset in given.datasets))
    if not any(dataset.validation_split for dataset in spec.datasets):
        return Split(training=tuple(records), findings=tuple(_without_effect(given, options)))
    members: defaultdict[tuple[int, int], list[ImageRecord]] = defaultdict(list)
    for record in records:
        if not record.is_reg:
            members[record.dataset, record.subset].append(record)
    chosen = {
        id(record)
        for (dataset, subset), images in members.items()
        for record in _chosen(images, spec.datasets[dataset], spec.datasets[dataset].subsets[subset])
    }
    held = [record for record in records if id(record) in chosen]
    files = {os.path.realpath(record.path) for record in held}
    training = [record for record in records if id(record) not in chosen]
    shared = [record for record in training if os.path.realpath(record.path) in files]
    if shared:
        out = {id(record) for record in shared}
        training = [record for record in training if id(record) not in out]
    training = [record for number in range(len(spec.datasets)) for record in _rebalanced(training, number, spec)]
    held_out = HeldOut(
        spec=replace(spec, datasets=tuple(_as_validated(dataset) for dataset in spec.datasets)),
        records=tuple(_as_read(record, spec) for record in held),
    )
    return Split(
        training=tuple(training),
        held_out=held_out if held else None,
        findings=tuple(_findings(spec, training, held, shared)),
    )


def number_held_out(images: int, split: float) -> int:
    """How many of ``images`` are held out: the nearest whole number, but at least one of several."""
    if not split or images < 2:
        return images if split == 1 else 0
    return max(1, round(images * split))


def relative_name(record: ImageRecord, subset: SubsetSpec) -> str:
    """The path of an image below the folder of its subset, with forward slashes."""
    try:
        return os.path.relpath(record.path, subset.image_dir).replace(os.sep, "/")
    except ValueError:
        # On another drive, where a metadata file may name it.
        return record.path.name


def _settled(dataset: DatasetSpec, options: ValidationOptions) -> DatasetSpec:
    split, seed = dataset.validation_split, dataset.validation_seed
    if seed is None:
        seed = DEFAULT_SEED if options.validation_seed is None else options.validation_seed
    return replace(dataset, validation_split=options.validation_split if split is None else split, validation_seed=seed)


def _chosen(images: Sequence[ImageRecord], dataset: DatasetSpec, subset: SubsetSpec) -> list[ImageRecord]:
    def rank(record: ImageRecord) -> tuple[int, str]:
        name = relative_name(record, subset)
        return key(dataset.validation_seed or DEFAULT_SEED, "validation split", name), name

    return sorted(images, key=rank)[: number_held_out(len(images), dataset.validation_split or 0.0)]


def _rebalanced(training: Iterable[ImageRecord], number: int, spec: DataSpec) -> list[ImageRecord]:
    """The images of a data set, its regularisation images balanced against what is left to train on."""
    records = [record for record in training if record.dataset == number]
    trained = sum(record.repeats for record in records if not record.is_reg)
    subsets = spec.datasets[number].subsets
    # Those that balancing had left out before stay out: with fewer training images they are needed still less.
    regularisation = [subsets[record.subset].num_repeats for record in records if record.is_reg]
    repeats = iter(balance_regularisation(trained, regularisation))
    balanced = [replace(record, repeats=next(repeats)) if record.is_reg else record for record in records]
    return [record for record in balanced if record.repeats]


def _as_validated(dataset: DatasetSpec) -> DatasetSpec:
    subsets = (replace(subset, captions=CaptionRules(), augment=AugmentRules()) for subset in dataset.subsets)
    return replace(dataset, subsets=tuple(subsets))


def _as_read(record: ImageRecord, spec: DataSpec) -> ImageRecord:
    """``record`` with the caption that validation uses: all tags in their order; a wildcard's choice never changes."""
    dataset = spec.datasets[record.dataset]
    subset = dataset.subsets[record.subset]
    rules = subset.captions
    is_rearranged = rules.shuffle_caption or rules.token_warmup_step or rules.caption_tag_dropout_rate
    plain = replace(
        rules,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        # A warm-up that is over: tags are joined, and marks between them removed, as they are where they are shuffled.
        token_warmup_step=1.0 if is_rearranged else 0.0,
    )
    rng = python_random(dataset.validation_seed or DEFAULT_SEED, "validation caption", relative_name(record, subset))
    caption = caption_for(record.caption, plain, rng, epoch=1, step=1, total_steps=1)
    return replace(record, caption=caption, repeats=1)


def _findings(
    spec: DataSpec, training: Sequence[ImageRecord], held: Sequence[ImageRecord], shared: Sequence[ImageRecord]
) -> Iterable[Finding]:
    where = spec.where if spec.where.endswith((".toml", ".json")) else "--validation_split"
    if not held:
        yield error(
            "validation_split holds out no image: no subset has more than one image",
            where,
            "Leave it out, or add images.",
        )
    elif not any(not record.is_reg for record in training):
        yield error(
            f"validation_split leaves no image to train on: all {len(held)} are held out",
            where,
            "Use a smaller part, for example 0.1.",
        )
    if shared:
        yield warning(
            f"{len(shared)} images are not trained on, because the same files are held out elsewhere: "
            f"{named([record.path.name for record in shared], _MOST_NAMED)}",
            where,
            "Give the data sets the same validation_split, or different images.",
        )


def _without_effect(spec: DataSpec, options: ValidationOptions) -> Iterable[Finding]:
    given: Mapping[str, object] = {
        "validation_seed": options.validation_seed,
        "validate_every_n_steps": options.validate_every_n_steps,
        "validate_every_n_epochs": options.validate_every_n_epochs,
        "max_validation_steps": options.max_validation_steps,
    }
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if any(dataset.validation_seed is not None for dataset in spec.datasets):
        names.append(f"validation_seed in {spec.where}")
    if names:
        yield warning(
            f"without effect, because no image is held out: {', '.join(names)}",
            names[0],
            "Give --validation_split (0.1 holds out a tenth of the images), or leave them out.",
        )
