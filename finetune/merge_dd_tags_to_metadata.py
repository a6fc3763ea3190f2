"""Gather the tags beside images in a metadata file, whichever tagger wrote them.

Usage, from anywhere: ``python finetune/merge_dd_tags_to_metadata.py [--full_path] TRAIN_DATA_DIR OUT_JSON``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from finetune.merging import TagOptions, merge  # noqa: E402
from library.errors import run_script  # noqa: E402

DESCRIPTION = (
    "Gather the tag files beside the images of a folder in a metadata file, as the tags of their entries; all other "
    "entries and fields stay. Reads what DeepDanbooru and the WD14 tagger write."
)


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return merge(argv, TagOptions, field="tags", prog=Path(__file__).name, description=DESCRIPTION)


if __name__ == "__main__":
    run_script(main)
