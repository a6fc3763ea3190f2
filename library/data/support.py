"""Which kinds of data sets a training method can use; what it cannot use is refused with the way out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from library.data.caption_files import NO_CAPTION_FILES
from library.data.config_file import Section
from library.data.findings import Finding, error
from library.data.options import CaptionOptions, SourceOptions
from library.data.schema import CAPTION_DROPOUT_KEYS, FOLDER_KEYS
from library.data.spec import DataSpec, SubsetSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSupport:
    """What a method can use.

    Attributes:
        folders: Images described by their folders and caption files.
        metadata: Images described by a metadata file.
        regularisation: Regularisation images.
        masks: Masks of the loss, as files or as transparency.
        captions: Captions of the images to train on. Where they are not used, their files are not looked for.
        caption_dropout: Leaving out captions, or tags of them, at random.
        needs_masks: Asking for masks where there are none is a mistake, and not just worth telling.
    """

    folders: bool = True
    metadata: bool = True
    regularisation: bool = True
    masks: bool = True
    captions: bool = True
    caption_dropout: bool = True
    needs_masks: bool = True


NETWORK: Final = DataSupport()
"""Networks beside the model: everything."""

DREAMBOOTH: Final = DataSupport(metadata=False)
"""The whole model, on folders of images."""

FINE_TUNING: Final = DataSupport(folders=False, regularisation=False, needs_masks=False)
"""The whole model, on metadata files; front ends write --masked_loss for sets without masks, too."""

TEXTUAL_INVERSION: Final = DataSupport(caption_dropout=False)
"""Embeddings: without its caption an example would not hold the word that is trained."""


def check_support(
    spec: DataSpec, source: SourceOptions, captions: CaptionOptions, support: DataSupport
) -> Iterator[Finding]:
    """What of the data sets, and of the options that describe them, the method cannot use."""
    for dataset in spec.datasets:
        for subset in dataset.subsets:
            yield from _check_subset(subset, support)
    if not support.masks and source.masked_loss:
        yield error("masks are not used by this method", "--masked_loss", "Leave it out, or use train_network.py.")
    if not support.caption_dropout:
        for name in sorted(CAPTION_DROPOUT_KEYS):
            if getattr(captions, name):
                yield error(
                    f"--{name} has no meaning here: this method needs every caption", f"--{name}", "Leave it out."
                )


def used_by(spec: DataSpec, support: DataSupport) -> DataSpec:
    """``spec`` without the caption files that the method does not read."""
    if support.captions:
        return spec
    datasets = (
        replace(
            dataset,
            subsets=tuple(
                subset if subset.is_reg else replace(subset, caption_extension=NO_CAPTION_FILES)
                for subset in dataset.subsets
            ),
        )
        for dataset in spec.datasets
    )
    return replace(spec, datasets=tuple(datasets))


def check_general(general: Section, support: DataSupport) -> Iterator[Finding]:
    """Keys of ``[general]`` that no data set of the method can use."""
    if support.folders:
        return
    for name in sorted(FOLDER_KEYS & general.values.keys()):
        yield error(
            f"{name} has no meaning here: every data set of this method has a metadata file",
            general.places.get(name, general.where),
            "Remove the line.",
        )


def _check_subset(subset: SubsetSpec, support: DataSupport) -> Iterator[Finding]:
    if subset.metadata_file is None and not support.folders:
        yield error(
            f"images '{subset.name}': this method trains on images described by a metadata file only",
            subset.where,
            "Give --in_json, or metadata_file = 'file.json' in each subset; or use train_db.py or train_network.py.",
        )
    if subset.metadata_file is not None and not support.metadata:
        yield error(
            f"images '{subset.name}': this method trains on folders of images, not on a metadata file",
            subset.where,
            "Give --train_data_dir, or image_dir with caption files; or use fine_tune.py or train_network.py.",
        )
    if subset.is_reg and not support.regularisation:
        yield error(
            f"images '{subset.name}': this method has no regularisation images",
            subset.where,
            "Remove them, or use train_db.py or train_network.py.",
        )
    if not support.masks and (subset.alpha_mask or subset.conditioning_data_dir is not None):
        yield error(
            f"images '{subset.name}': masks are not used by this method",
            subset.where,
            "Remove alpha_mask and conditioning_data_dir, or use train_network.py.",
        )
