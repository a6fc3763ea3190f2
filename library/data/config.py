"""From options, a dataset file or named folders to a :class:`DataSpec`, with everything that is wrong told at once."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from library.data.cache_conflicts import cache_conflicts
from library.data.config_file import DatasetSection, Section, read_dataset_file
from library.data.findings import Finding, error, warning, warnings_of
from library.data.folders import explain_base_dir, image_names, is_empty, parse_folder_name, shown_name, subfolder_names
from library.data.metadata import largest_train_resolution
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions
from library.data.schema import CAPTION_DROPOUT_KEYS, KEYS
from library.data.spec import AugmentRules, BucketRules, CaptionRules, DatasetSpec, DataSpec, Size, SubsetSpec
from library.data.styles import check_style
from library.data.support import NETWORK, DataSupport, check_general, check_support, used_by
from library.documents import home_expanded

_log = logging.getLogger(__name__)

_RESOLUTION_GRID: Final = 8
"""The VAE shrinks by 8."""

_UNET_GRID: Final = 64
"""Sides that are multiples of 64 stay whole at every level of the U-Net."""


@dataclass(frozen=True, slots=True)
class _Chain:
    """Sections from the nearest to the farthest; the first that gives a key decides it."""

    sections: tuple[Section, ...]

    def __getitem__(self, name: str) -> Any:
        for section in self.sections:
            if name in section.values:
                return section.values[name]
        return KEYS[name].default

    def where(self, name: str) -> str:
        """Where the value of ``name`` comes from."""
        for section in self.sections:
            if name in section.values:
                return section.places.get(name, section.where)
        return self.sections[0].where

    def rules(self, kind: type[Any]) -> Any:
        """A rules dataclass, each field by the key of its name."""
        return kind(**{rule.name: self[rule.name] for rule in fields(kind)})


def load_spec(
    source: SourceOptions,
    image: ImageOptions,
    captions: CaptionOptions,
    cache: CacheOptions,
    *,
    support: DataSupport = NETWORK,
) -> DataSpec:
    """The training set that the options describe; what is remarkable about it goes to the log.

    Args:
        source: Where the images are: a dataset file, or a folder of named folders.
        image: Fallbacks for what the dataset file does not say about images.
        captions: Fallbacks for what it does not say about captions.
        cache: Whether latents are cached, which excludes some augmentations.
        support: What the method can use.

    Raises:
        UserError: With every problem found.
    """
    spec, findings = read_spec(source, image, captions, cache, support=support)
    for finding in warnings_of(findings):
        _log.warning("%s", finding)
    return spec


def read_spec(
    source: SourceOptions,
    image: ImageOptions,
    captions: CaptionOptions,
    cache: CacheOptions,
    *,
    support: DataSupport = NETWORK,
) -> tuple[DataSpec, list[Finding]]:
    """As :func:`load_spec`, but with the findings returned, errors among them: the rest can then be checked too.

    Raises:
        UserError: The dataset file cannot be read at all.
    """
    flags = _command_line(source, image, captions, support)
    if source.dataset_config is not None:
        spec, findings = _from_file(source.dataset_config, flags, support)
        if source.train_data_dir or source.reg_data_dir or source.in_json:
            findings.append(
                warning(
                    "--train_data_dir, --reg_data_dir and --in_json are ignored: the dataset file names the folders",
                    "--dataset_config",
                    "Leave them out.",
                )
            )
    elif source.in_json is not None:
        spec, findings = _from_metadata(source.in_json, source, flags)
    else:
        spec, findings = _from_folders(source, flags, support)
    findings.extend(check_support(spec, source, captions, support))
    if cache.settled().cache_latents:
        findings.extend(cache_conflicts(spec))
    findings.extend(_without_effect(spec))
    findings.extend(_mask_conflicts(spec, source, support))
    return used_by(spec, support), findings


def _command_line(
    source: SourceOptions, image: ImageOptions, captions: CaptionOptions, support: DataSupport
) -> Section:
    """The options as the outermost section, under the names that the keys have in a file."""
    given: dict[str, Any] = {"dataset_repeats": source.dataset_repeats, "cache_info": source.cache_info}
    for group in (image, captions.settled()):
        given |= {option.name: getattr(group, option.name) for option in fields(group)}
    keys = [key for key in KEYS.values() if key.flag is not None and given.get(key.flag) is not None]
    if not support.caption_dropout:
        keys = [key for key in keys if key.name not in CAPTION_DROPOUT_KEYS]
    return Section(
        "command line",
        {key.name: given[str(key.flag)] for key in keys},
        {key.name: f"--{key.flag}" for key in keys},
    )


def _from_file(path: Path, flags: Section, support: DataSupport) -> tuple[DataSpec, list[Finding]]:
    file, findings = read_dataset_file(path, caption_dropout=support.caption_dropout)
    findings.extend(check_general(file.general, support))
    datasets = []
    for dataset in file.datasets:
        chain = _Chain((dataset.section, file.general, flags))
        findings.extend(check_style(dataset))
        subsets = tuple(_subsets_of(dataset, chain, path.parent, findings))
        datasets.append(_dataset(chain, subsets, dataset.section.where, findings))
    if not datasets:
        findings.append(
            error("the file describes no data set", str(path), "Add [[datasets]] and [[datasets.subsets]].")
        )
    return DataSpec(datasets=tuple(datasets), where=str(path)), findings


def _subsets_of(dataset: DatasetSection, chain: _Chain, beside: Path, findings: list[Finding]) -> Iterable[SubsetSpec]:
    """The subsets of a data set; ``beside`` is the folder of the file, tried for relative paths."""
    if not dataset.subsets:
        findings.append(
            error(
                "the data set has no subsets, so no images",
                dataset.section.where,
                "Add [[datasets.subsets]] with image_dir = 'folder of the images'.",
            )
        )
    for section in dataset.subsets:
        own = _Chain((section, *chain.sections))
        image_dir = section.values.get("image_dir")
        metadata_file = section.values.get("metadata_file")
        folder = None if image_dir is None else _locate(image_dir, beside)
        if metadata_file is not None:
            subset = _described_subset(own, _locate(metadata_file, beside), folder, section.where)
        elif folder is not None:
            subset = _subset(own, folder, section.where, written=str(image_dir))
        else:
            findings.append(
                error("the subset has no image_dir", section.where, "Add image_dir = 'folder of the images'.")
            )
            continue
        masks = section.values.get("conditioning_data_dir")
        yield subset if masks is None else replace(subset, conditioning_data_dir=_locate(masks, beside))


def _locate(written: str, beside: Path) -> Path:
    """A path as the current directory has it; or else, if it is there, as the folder of the dataset file has it.

    Where it is in neither, the folder of the file has it if a folder there is called alike: that name is then proposed.
    """
    path = home_expanded(Path(written))
    if path.exists():
        return path
    other = beside / path
    return other if other.exists() or (_has_namesake(other) and not _has_namesake(path)) else path


def _has_namesake(path: Path) -> bool:
    """Whether a folder is called almost like the first part of ``path`` that does not exist."""
    existing = next((parent for parent in path.parents if parent.is_dir()), Path())
    names = [name.lower() for name in subfolder_names(existing)]
    return bool(get_close_matches(path.relative_to(existing).parts[0].lower(), names, n=1))


def _subset(chain: _Chain, image_dir: Path, where: str, *, written: str | None = None) -> SubsetSpec:
    return SubsetSpec(
        image_dir=image_dir,
        name=shown_name(image_dir),
        where=where,
        class_tokens=chain["class_tokens"],
        is_reg=chain["is_reg"],
        num_repeats=chain["num_repeats"],
        caption_extension=chain["caption_extension"],
        captions=chain.rules(CaptionRules),
        augment=chain.rules(AugmentRules),
        resize_interpolation=chain["resize_interpolation"],
        alpha_mask=chain["alpha_mask"],
        custom_attributes=chain["custom_attributes"],
        cache_info=chain["cache_info"],
        written_dir=str(image_dir) if written is None else written,
    )


def _described_subset(chain: _Chain, metadata_file: Path, image_dir: Path | None, where: str) -> SubsetSpec:
    """A subset with a metadata file; without an image folder, keys start at the folder of that file."""
    return replace(
        _subset(chain, metadata_file.parent if image_dir is None else image_dir, where),
        name=shown_name(metadata_file),
        metadata_file=metadata_file,
        # What [general] says of caption files and classes is meant for other data sets.
        class_tokens=None,
        is_reg=False,
    )


def _from_metadata(metadata_file: Path, source: SourceOptions, flags: Section) -> tuple[DataSpec, list[Finding]]:
    """The data set of ``--in_json`` with its images in ``--train_data_dir``."""
    findings: list[Finding] = []
    if source.reg_data_dir is not None:
        findings.append(
            error(
                "--reg_data_dir does not go with --in_json, where there are no regularisation images",
                "--reg_data_dir",
                "Leave it out, or describe both sets in a file given with --dataset_config.",
            )
        )
    chain = _Chain((flags,))
    subset = _described_subset(chain, metadata_file, source.train_data_dir, "--in_json")
    subset = replace(subset, conditioning_data_dir=source.conditioning_data_dir)
    return DataSpec(datasets=(_dataset(chain, (subset,), "--in_json", findings),), where="--in_json"), findings


def _from_folders(source: SourceOptions, flags: Section, support: DataSupport) -> tuple[DataSpec, list[Finding]]:
    """The data set made of the folders ``<repeats>_<class tokens>`` in ``--train_data_dir`` and ``--reg_data_dir``."""
    findings: list[Finding] = []
    if source.train_data_dir is None or not support.folders:
        findings.append(_nothing_given(support))
    chain = _Chain((flags,))
    subsets = tuple(
        _with_masks(subset, source.conditioning_data_dir)
        for base, flag in ((source.train_data_dir, "--train_data_dir"), (source.reg_data_dir, "--reg_data_dir"))
        if base is not None and support.folders
        for subset in _named_subsets(base, flag, chain, findings)
    )
    dataset = _dataset(chain, subsets, "--train_data_dir", findings)
    return DataSpec(datasets=(dataset,), where="--train_data_dir"), findings


def _nothing_given(support: DataSupport) -> Finding:
    if not support.folders:
        remedy = (
            "Give --dataset_config=FILE, or --in_json=FILE with its images in --train_data_dir=FOLDER; "
            "train_db.py and train_network.py train on folders alone."
        )
        return error("no metadata file is given, and this method trains on nothing else", "command line", remedy)
    remedy = "Give --dataset_config=FILE, or --train_data_dir=FOLDER with folders such as '10_sks dog' in it."
    return error("no training images are given", "command line", remedy)


def _with_masks(subset: SubsetSpec, masks: Path | None) -> SubsetSpec:
    """``subset`` with its folder of masks: in ``masks`` the folder of its own name, if there is one."""
    if masks is None or subset.is_reg:
        return subset
    own = masks / subset.image_dir.name
    return replace(subset, conditioning_data_dir=own if own.is_dir() else masks)


def _named_subsets(base: Path, flag: str, chain: _Chain, findings: list[Finding]) -> Iterable[SubsetSpec]:
    if flag == "--reg_data_dir" and is_empty(base):
        # Front ends make the folder and name it for every run.
        what = f"no regularisation images: the folder '{base}' is empty"
        findings.append(warning(what, flag, f"Leave it so if it is meant, or leave {flag} out."))
        return
    if advice := explain_base_dir(base, flag=flag):
        findings.append(error(advice.what, flag, advice.remedy))
        return
    for name in subfolder_names(base):
        parsed = parse_folder_name(name)
        if parsed is None:
            findings.extend(_ignored_folder(base / name, flag))
            continue
        values = {"num_repeats": parsed[0], "class_tokens": parsed[1], "is_reg": flag == "--reg_data_dir"}
        yield _subset(_Chain((Section(flag, values), *chain.sections)), base / name, flag)


def _ignored_folder(folder: Path, flag: str) -> list[Finding]:
    count = len(image_names(folder))
    if not count:
        return []
    return [
        warning(
            f"the folder '{folder}' with {count} images is ignored: its name is not '<repeats>_<class>'",
            flag,
            f"To train on it, rename it to '10_{folder.name}'.",
        )
    ]


def _dataset(chain: _Chain, subsets: tuple[SubsetSpec, ...], where: str, findings: list[Finding]) -> DatasetSpec:
    resolution = chain["resolution"]
    rules = chain.rules(BucketRules)
    if resolution is None and all(subset.metadata_file is not None for subset in subsets):
        resolution = largest_train_resolution(subset.metadata_file for subset in subsets if subset.metadata_file)
    if resolution is None:
        remedy = "Give --resolution, or write resolution = 512 under [[datasets]]."
        findings.append(error("no training resolution is given", where, remedy))
        # Any size will do for the checks that follow; with buckets they do not compare the images with it.
        resolution, rules = (512, 512), BucketRules(enable_bucket=True)
    elif not rules.enable_bucket:
        findings.extend(_check_resolution(resolution, chain.where("resolution")))
    elif found := list(_check_buckets(resolution, rules, chain)):
        findings.extend(found)
    if rules.enable_bucket:
        low, high = bucket_bounds(rules.min_bucket_reso, rules.max_bucket_reso, rules.bucket_reso_steps)
        rules = BucketRules(
            enable_bucket=True,
            # Never 0, so that what follows can be checked although the bound was refused.
            min_bucket_reso=max(low, rules.bucket_reso_steps),
            max_bucket_reso=high,
            bucket_reso_steps=rules.bucket_reso_steps,
            bucket_no_upscale=rules.bucket_no_upscale,
        )
    findings.extend(_duplicates(subsets))
    return DatasetSpec(
        resolution=resolution,
        batch_size=chain["batch_size"],
        buckets=rules,
        subsets=subsets,
        network_multiplier=chain["network_multiplier"],
        validation_split=chain["validation_split"],
        validation_seed=chain["validation_seed"],
        where=where,
    )


def bucket_bounds(shortest: int, longest: int, step: int) -> tuple[int, int]:
    """The bounds of the bucket sides on the grid of ``step``: the lower rounded down, the upper rounded up."""
    return shortest // step * step, -(-longest // step) * step


def _check_resolution(resolution: Size, where: str) -> list[Finding]:
    if all(side % _RESOLUTION_GRID == 0 for side in resolution):
        return []
    nearest = tuple(round(side / _RESOLUTION_GRID) * _RESOLUTION_GRID for side in resolution)
    return [
        error(
            f"the sides of the resolution {resolution[0]}x{resolution[1]} are not multiples of {_RESOLUTION_GRID}",
            where,
            f"Use {nearest[0]}x{nearest[1]}.",
        )
    ]


def _check_buckets(resolution: Size, rules: BucketRules, chain: _Chain) -> Iterable[Finding]:
    step = rules.bucket_reso_steps
    if step % _RESOLUTION_GRID:
        yield error(
            f"bucket_reso_steps {step} is not a multiple of {_RESOLUTION_GRID}",
            chain.where("bucket_reso_steps"),
            f"Use {_UNET_GRID}, or another multiple of {_RESOLUTION_GRID}.",
        )
        return
    if step % _UNET_GRID:
        yield warning(
            f"bucket_reso_steps {step} is not a multiple of {_UNET_GRID}: it works, but some programs refuse it",
            chain.where("bucket_reso_steps"),
            f"Use {_UNET_GRID} unless you need finer buckets.",
        )
    low, high = bucket_bounds(rules.min_bucket_reso, rules.max_bucket_reso, step)
    yield from _rounded("min_bucket_reso", rules.min_bucket_reso, low, chain)
    yield from _rounded("max_bucket_reso", rules.max_bucket_reso, high, chain)
    sides = f"{resolution[0]}x{resolution[1]}"
    if low == 0:
        yield error(
            f"min_bucket_reso {rules.min_bucket_reso} is below bucket_reso_steps {step}",
            chain.where("min_bucket_reso"),
            f"Use min_bucket_reso = {step} or a smaller bucket_reso_steps.",
        )
    if low > min(resolution):
        yield error(
            f"the resolution {sides} fits no bucket: min_bucket_reso {low} is above its shorter side",
            chain.where("min_bucket_reso"),
            f"Use min_bucket_reso = {max(min(resolution) // step * step, step)} or less, or a higher resolution.",
        )
    if high < max(resolution):
        yield error(
            f"the resolution {sides} fits no bucket: max_bucket_reso {high} is below its longer side",
            chain.where("max_bucket_reso"),
            f"Use max_bucket_reso = {-(-max(resolution) // step) * step} or more, or a lower resolution.",
        )


def _rounded(name: str, value: int, result: int, chain: _Chain) -> list[Finding]:
    if value == result:
        return []
    return [
        warning(
            f"{name} {value} is rounded to {result}, a multiple of bucket_reso_steps",
            chain.where(name),
            f"Write {name} = {result}.",
        )
    ]


def _duplicates(subsets: Iterable[SubsetSpec]) -> Iterable[Finding]:
    seen: dict[Path, SubsetSpec] = {}
    for subset in subsets:
        path = subset.metadata_file or subset.image_dir
        first = seen.setdefault(path.resolve(), subset)
        if first is not subset:
            kind = "folder" if subset.metadata_file is None else "metadata file"
            yield error(
                f"the {kind} '{path}' is given twice in one data set (first at {first.where})",
                subset.where,
                f"Remove one, or raise num_repeats; the same {kind} may stand in different data sets.",
            )


def _mask_conflicts(spec: DataSpec, source: SourceOptions, support: DataSupport) -> Iterable[Finding]:
    """Masks that are asked for in one place only."""
    subsets = [subset for dataset in spec.datasets for subset in dataset.subsets]
    with_folder = [subset for subset in subsets if subset.conditioning_data_dir is not None]
    if source.conditioning_data_dir is not None and source.dataset_config is not None:
        yield error(
            "--conditioning_data_dir is not used with a dataset file",
            "--conditioning_data_dir",
            "Write conditioning_data_dir = 'folder of the masks' under [[datasets.subsets]].",
        )
    elif with_folder and not source.masked_loss:
        yield error(
            "a folder of masks is given, but masks are not switched on",
            with_folder[0].where if source.dataset_config else "--conditioning_data_dir",
            "Add --masked_loss, or remove the folder of masks.",
        )
    elif source.masked_loss and not with_folder and not any(subset.alpha_mask for subset in subsets):
        yield (error if support.needs_masks else warning)(
            "--masked_loss is given, but no masks",
            "--masked_loss",
            "Give conditioning_data_dir (folder of masks) or alpha_mask (transparency), or leave out --masked_loss.",
        )


def _without_effect(spec: DataSpec) -> Iterable[Finding]:
    """Keys that files carry for other programs and models."""
    for dataset in spec.datasets:
        if dataset.network_multiplier != 1.0:
            yield warning(
                f"network_multiplier {dataset.network_multiplier:g} changes nothing for Stable Diffusion 1 and 2",
                dataset.where,
                "Leave it out.",
            )
        for subset in dataset.subsets:
            if subset.cache_info and subset.metadata_file is not None:
                yield warning(
                    f"cache_info has no effect on '{subset.name}': its metadata file holds the captions already",
                    subset.where,
                    "Leave it out.",
                )
            if subset.custom_attributes.get("diff_output_preservation"):
                yield error(
                    f"diff_output_preservation is not available yet (images '{subset.name}')",
                    subset.where,
                    "Leave it out.",
                )
            elif subset.custom_attributes:
                names = ", ".join(subset.custom_attributes)
                yield warning(
                    f"custom_attributes of '{subset.name}' are read by nothing here: {names}",
                    subset.where,
                    "Leave them out.",
                )
