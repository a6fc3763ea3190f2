"""Tidy up the captions and tags of a metadata file.

Usage, from anywhere: ``python finetune/clean_captions_and_tags.py IN_JSON OUT_JSON``. The words that are replaced stand
in ``finetune/cleaning.py``, which is there to be changed.
"""

import logging
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from finetune.cleaning import clean_caption, clean_tags  # noqa: E402
from finetune.merging import ShowOptions  # noqa: E402
from finetune.metadata_files import check_writable, read_entries, store  # noqa: E402
from library.errors import Problem, run_script  # noqa: E402
from library.option_positions import missing_positions, name_positions, split_positions  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402

log = logging.getLogger("clean_captions_and_tags")

DESCRIPTION = (
    "Tidy up the captions and tags of a metadata file: underscores and ratings, tags that others include, features "
    "that contradict each other where several people are in a picture, and the many words for a person."
)
ORDER = ("in_json", "out_json")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """Files."""

    in_json: Path | None = option(None, metavar="FILE", help="Metadata file to read.")
    out_json: Path | None = option(None, metavar="FILE", help="Metadata file to write; may be the same.")

    def problems(self) -> list[Problem]:
        """What is missing."""
        return missing_positions({"in_json": self.in_json, "out_json": self.out_json})


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    place: PlaceOptions
    show: ShowOptions


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    set_up_logging(ConsoleOptions())
    words, rest = split_positions(Options, argv)
    if len(words) == len(ORDER) + 1:
        log.warning("the folder of images is needed no longer: '%s' is not used", words.pop(0))
    given = [*name_positions(words, ORDER), *rest]
    prog = f"{Path(__file__).name} {' '.join(ORDER)}"
    options = parse_options(Options, given, prog=prog, description=DESCRIPTION)
    source, target = options.place.in_json, options.place.out_json
    assert source is not None, "asked for with the options"
    assert target is not None, "asked for with the options"
    check_writable(target)
    before = read_entries(source)
    after = deepcopy(before)
    for key, entry in tqdm(after.items(), desc="cleaning", unit="entry", disable=None, leave=False):
        for name, clean in (("tags", clean_tags), ("caption", clean_caption)):
            if entry.get(name):
                entry[name] = clean(entry[name])
                if options.show.debug:
                    print(f"{key}  {name}: {before[key][name]} -> {entry[name]}")
    for name in ("tags", "caption"):
        without = sum(not entry.get(name) for entry in after.values())
        if without:
            log.info("%d of %d entries have no %s", without, len(after), name)
    store(target, before, after, source=source, dry_run=options.show.dry_run)
    return 0


if __name__ == "__main__":
    run_script(main)
