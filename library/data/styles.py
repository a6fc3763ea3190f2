"""How a data set is described, by folders or by metadata files: one way for all of its subsets."""

from collections.abc import Iterator

from library.data.config_file import DatasetSection, Section
from library.data.findings import Finding, error
from library.data.schema import FOLDER_KEYS


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
    for name in sorted(FOLDER_KEYS & section.values.keys()):
        yield error(
            f"{name} has no meaning beside metadata_file",
            section.places.get(name, section.where),
            "Remove the line, or put the folder into a [[datasets]] without metadata_file.",
        )
