"""What is said of the training set: in the result's metadata (``ss_*``), and on the console before training.

Folders are called by their own name; no path leaves the machine in a file.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from library.data.caption_files import NO_CAPTION_FILES
from library.data.folders import shown_name
from library.data.records import ImageRecord
from library.data.setup import TrainingData
from library.data.spec import DatasetSpec, DataSpec, Size, SubsetSpec

_EXAMPLES: Final = 3
_LONGEST_EXAMPLE: Final = 100


def dataset_metadata(spec: DataSpec, data: TrainingData, *, batches_per_step: int = 1) -> dict[str, str]:
    """The ``ss_*`` keys that describe the data sets, as text.

    A dataset file gives ``ss_datasets``; a folder of named folders gives the single values. ``ss_dataset_dirs`` and
    ``ss_tag_frequency`` are in both.

    Args:
        spec: The data sets.
        data: Their images and buckets.
        batches_per_step: Batches of all processes that make one optimizer step.
    """
    if spec.where.startswith("--"):
        return _single_metadata(spec.datasets[0], data, batches_per_step)
    datasets = [_describe_dataset(number, dataset, data) for number, dataset in enumerate(spec.datasets)]
    tags: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        tags = tags | {name: counts for name, counts in dataset["tag_frequency"].items() if name not in tags}
    return {
        "ss_datasets": json.dumps(datasets),
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps(_folders(_train_subsets(spec), data)),
    }


def _single_metadata(dataset: DatasetSpec, data: TrainingData, batches_per_step: int) -> dict[str, str]:
    subset = dataset.subsets[0]
    rules = dataset.buckets
    numbered = [((0, position), subset) for position, subset in enumerate(dataset.subsets)]
    values: dict[str, object] = {
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_total_batch_size": dataset.batch_size * batches_per_step,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": subset.augment.color_aug,
        "ss_flip_aug": subset.augment.flip_aug,
        "ss_random_crop": subset.augment.random_crop,
        "ss_shuffle_caption": subset.captions.shuffle_caption,
        "ss_keep_tokens": subset.captions.keep_tokens,
        "ss_enable_bucket": rules.enable_bucket,
        "ss_bucket_no_upscale": rules.bucket_no_upscale,
        "ss_min_bucket_reso": rules.min_bucket_reso if rules.enable_bucket else None,
        "ss_max_bucket_reso": rules.max_bucket_reso if rules.enable_bucket else None,
    }
    texts = {
        "ss_dataset_dirs": _folders([(at, subset) for at, subset in numbered if not subset.is_reg], data),
        "ss_reg_dataset_dirs": _folders([(at, subset) for at, subset in numbered if subset.is_reg], data),
        "ss_tag_frequency": _tag_frequency(0, dataset, data),
        "ss_bucket_info": _bucket_info(0, dataset, data),
    }
    return {name: str(value) for name, value in values.items()} | {
        name: json.dumps(value) for name, value in texts.items()
    }


def _describe_dataset(number: int, dataset: DatasetSpec, data: TrainingData) -> dict[str, Any]:
    rules = dataset.buckets
    own = [record for record in data.records if record.dataset == number]
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(record.repeats for record in own if not record.is_reg),
        "num_reg_images": sum(record.repeats for record in own if record.is_reg),
        "resolution": dataset.resolution,
        "enable_bucket": rules.enable_bucket,
        "min_bucket_reso": rules.min_bucket_reso if rules.enable_bucket else None,
        "max_bucket_reso": rules.max_bucket_reso if rules.enable_bucket else None,
        "tag_frequency": _tag_frequency(number, dataset, data),
        "bucket_info": _bucket_info(number, dataset, data),
        "resize_interpolation": dataset.subsets[0].resize_interpolation,
        "subsets": [
            _describe_subset(subset, _images_of((number, position), data))
            for position, subset in enumerate(dataset.subsets)
        ],
    }


def _describe_subset(subset: SubsetSpec, images: Sequence[ImageRecord]) -> dict[str, Any]:
    rules, augment = subset.captions, subset.augment
    if subset.metadata_file is None:
        source = {"image_dir": subset.name, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    else:
        source = {"image_dir": shown_name(subset.image_dir), "metadata_file": subset.name}
    return {
        "img_count": len(images),
        "num_repeats": subset.num_repeats,
        "color_aug": augment.color_aug,
        "flip_aug": augment.flip_aug,
        "random_crop": augment.random_crop,
        "shuffle_caption": rules.shuffle_caption,
        "keep_tokens": rules.keep_tokens,
        "keep_tokens_separator": rules.keep_tokens_separator,
        "secondary_separator": rules.secondary_separator or None,
        "enable_wildcard": rules.enable_wildcard,
        "caption_prefix": rules.caption_prefix or None,
        "caption_suffix": rules.caption_suffix or None,
        "resize_interpolation": subset.resize_interpolation,
        **source,
    }


def _images_of(position: tuple[int, int], data: TrainingData) -> list[ImageRecord]:
    return [record for record in data.records if (record.dataset, record.subset) == position]


def _train_subsets(spec: DataSpec) -> list[tuple[tuple[int, int], SubsetSpec]]:
    return [
        ((number, position), subset)
        for number, dataset in enumerate(spec.datasets)
        for position, subset in enumerate(dataset.subsets)
        if not subset.is_reg
    ]


def _folders(subsets: Iterable[tuple[tuple[int, int], SubsetSpec]], data: TrainingData) -> dict[str, dict[str, int]]:
    """Repeats and images by folder name; a name that comes again gets a number."""
    folders: dict[str, dict[str, int]] = {}
    for at, subset in subsets:
        name, number = subset.name, 1
        while name in folders:
            number += 1
            name = f"{subset.name} ({number})"
        folders[name] = {"n_repeats": subset.num_repeats, "img_count": len(_images_of(at, data))}
    return folders


def _tag_frequency(number: int, dataset: DatasetSpec, data: TrainingData) -> dict[str, dict[str, int]]:
    """How often each tag occurs in the captions of each folder."""
    frequency: dict[str, Counter[str]] = {}
    for position, subset in enumerate(dataset.subsets):
        counter = frequency.setdefault(subset.name, Counter())
        for record in _images_of((number, position), data):
            counter.update(tag_counts(record.caption if record.tags is None else record.tags))
    return {name: dict(counter) for name, counter in frequency.items()}


def tag_counts(caption: str) -> Counter[str]:
    """The tags of one caption: what stands between commas, in lower case."""
    return Counter(tag.strip().lower() for tag in caption.split(",") if tag.strip())


def _bucket_info(number: int, dataset: DatasetSpec, data: TrainingData) -> Mapping[str, Any] | None:
    if not dataset.buckets.enable_bucket:
        return None
    return {
        "buckets": {
            str(index): {"resolution": list(resolution), "count": count}
            for index, (resolution, count) in enumerate(_bucket_counts(number, data))
        },
        "mean_img_ar_error": data.mean_aspect_error(number),
    }


def _bucket_counts(number: int, data: TrainingData) -> list[tuple[Size, int]]:
    """The buckets in use of one data set with their images, repeats counted."""
    return [(bucket.resolution, len(bucket.plan.examples)) for bucket in data.buckets if bucket.dataset == number]


def startup_table(spec: DataSpec, data: TrainingData, caption_of: Callable[[int], str]) -> str:
    """What the training set holds: folders, captions with examples, regularisation and buckets; several lines.

    Args:
        spec: The data sets.
        data: Their images and buckets.
        caption_of: The caption of an example as it is trained on.
    """
    lines: list[str] = []
    for number, dataset in enumerate(spec.datasets):
        width, height = dataset.resolution
        lines.append(f"data set {number}: resolution ({width}, {height}), batch size {dataset.batch_size}")
        for position, subset in enumerate(dataset.subsets):
            lines.append(_subset_line(subset, _images_of((number, position), data)))
        lines.extend(_regularisation_lines([record for record in data.records if record.dataset == number]))
        if dataset.buckets.enable_bucket:
            lines.extend(_bucket_lines(number, data))
            lines.append(f"  mean ar error (without repeats): {data.mean_aspect_error(number):.4g}")
    lines.extend(_caption_examples(data, caption_of))
    return "\n".join(lines)


def _captions_line(subset: SubsetSpec, images: Sequence[ImageRecord]) -> str:
    tokens = f"'{subset.class_tokens}'" if subset.class_tokens else "an empty caption"
    place = subset.caption_extension if subset.metadata_file is None else subset.name
    if subset.metadata_file is None and place.startswith(NO_CAPTION_FILES):
        return f"no caption files: {tokens}"
    found = sum(record.has_caption_file for record in images)
    missing = f", {len(images) - found} missing: {tokens}" if found < len(images) else ""
    return f"{found} captions found ({place}){missing}"


def _subset_line(subset: SubsetSpec, images: Sequence[ImageRecord]) -> str:
    role = ", regularisation" if subset.is_reg else ""
    captions = _captions_line(subset, images)
    masks = sum(record.mask is not None for record in images)
    if masks or subset.alpha_mask:
        captions += f"; masks: {f'{masks} images' if masks else 'transparency'}"
    return f"  {subset.name}: {len(images)} images x {subset.num_repeats} repeats{role}; {captions}"


def _regularisation_lines(records: Sequence[ImageRecord]) -> list[str]:
    regularisation = [record for record in records if record.is_reg]
    if not regularisation:
        return []
    train = sum(record.repeats for record in records if not record.is_reg)
    used = sum(record.repeats for record in regularisation)
    least, most = min(record.repeats for record in regularisation), max(record.repeats for record in regularisation)
    each = f"{least}" if least == most else f"{least} to {most}"
    return [f"  regularisation: {used} for {train} training images an epoch; each is used {each} times"]


def _bucket_lines(dataset: int, data: TrainingData) -> list[str]:
    """The buckets of a data set with their images, repeats counted, and how much of an image the crop cuts off."""
    losses: defaultdict[Size, list[tuple[float, str]]] = defaultdict(list)
    for record, placement in zip(data.records, data.placements, strict=True):
        if record.dataset == dataset:
            losses[placement.bucket].append((placement.crop_loss, record.path.name))
    lines = []
    for index, (resolution, count) in enumerate(_bucket_counts(dataset, data)):
        own = losses[resolution]
        mean = sum(loss for loss, _ in own) / len(own)
        most, name = max(own)
        crop = f"crop loss {mean:.1%}, at most {most:.1%} ({name})" if most else "nothing cropped"
        lines.append(f"  bucket {index}: resolution {resolution}, count: {count}; {crop}")
    return lines


def _caption_examples(data: TrainingData, caption_of: Callable[[int], str]) -> list[str]:
    """The captions of a few images, spread over the set."""
    first_example: dict[int, int] = {}
    for example, number in enumerate(data.examples):
        if not data.records[number].is_reg:
            first_example.setdefault(number, example)
    numbers = list(first_example)
    last = len(numbers) - 1
    spread = [numbers[at] for at in sorted({last * part // (_EXAMPLES - 1) for part in range(_EXAMPLES)})]
    examples = ((data.records[number].path.name, caption_of(first_example[number])) for number in spread)
    return [
        "captions as trained on in epoch 1, for example:",
        *(f"  {name}: {_shortened(caption)}" for name, caption in examples),
    ]


def _shortened(caption: str) -> str:
    line = caption.replace("\n", " / ")
    return f"{line[:_LONGEST_EXAMPLE]}…" if len(line) > _LONGEST_EXAMPLE else line or "(empty)"
