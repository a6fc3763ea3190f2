"""How a data set is described, by folders or by metadata files: one way for all of its subsets."""

from collections.abc import Iterator
from typing import Final

from library.data.config_file import DatasetSection, Section
from library.data.findings import Finding, error

_FOLDERS_ONLY: Final = ("class_tokens", "is_reg", "caption_extension", "cache_info")
"""Keys that say where captions come from, or that there is a class: a metadata file says it itself."""


def check_style(dataset: DatasetSection) -> Iterator[Finding]:
    """What does not go together in a data set: subsets with and without a metadata file, and their keys."""
    described = [subset for subset in dataset.subsets if "metadata_file" in subset.values]
    if not described:
        return
    for subset in dataset.subsets:
        if subset not in described:
            yield error(
                "the subset has no metadata_file, but others of its data set have one",
                subset.where,
                "Put it into a [[datasets]] of its own.",
            )
    for section in (dataset.section, *described):
        yield from _without_meaning(section)


def _without_meaning(section: Section) -> Iterator[Finding]:
    for name in _FOLDERS_ONLY:
        if name in section.values:
            yield error(
                f"{name} has no meaning beside metadata_file",
                section.places.get(name, section.where),
                "Remove the line, or put the folder into a [[datasets]] without metadata_file.",
            )
