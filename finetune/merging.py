"""Text files beside images become fields of a metadata file."""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from tqdm import tqdm

from finetune.image_search import check_names, find_images, key_of, shared_keys
from finetune.metadata_files import Metadata, check_writable, quoted, read_entries, store
from library.data.caption_files import (
    CAPTION_SUFFIXES,
    UnreadableCaptionError,
    caption_name,
    index_names,
    read_text,
)
from library.data.options import caption_suffix
from library.errors import Problem, UserError
from library.option_positions import missing_positions, name_positions, split_positions
from library.options import option, parse_options
from library.runtime import set_up_logging
from library.runtime_options import ConsoleOptions

log = logging.getLogger(__name__)

SKIPPED: Final = 1
"""Exit code when files were skipped because they could not be read."""

_SEPARATORS: Final = ("/", "\\")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """Files."""

    train_data_dir: Path | None = option(None, metavar="DIR", help="Folder of the images and their text files.")
    out_json: Path | None = option(
        None, metavar="FILE", help="Metadata file to write (.json, or .jsonl for one object a line)."
    )
    in_json: Path | None = option(
        None,
        metavar="FILE",
        help="Metadata file to extend; without it OUT_JSON itself is extended if it exists. The two may be the same.",
    )
    full_path: bool = option(
        False, help="Call each image by its path, written as TRAIN_DATA_DIR is, instead of its name without suffix."
    )
    recursive: bool = option(False, help="Search the folders inside, too; needs --full_path.")

    def problems(self) -> list[Problem]:
        """What is missing, and names that would not be clear."""
        found = missing_positions({"train_data_dir": self.train_data_dir, "out_json": self.out_json})
        return found + recursive_problems(recursive=self.recursive, full_path=self.full_path)


def recursive_problems(*, recursive: bool, full_path: bool) -> list[Problem]:
    """Whether images of several folders would be called by their names alone."""
    if not recursive or full_path:
        return []
    return [
        Problem("--recursive needs --full_path: names alone do not say the folder", "--recursive", "Add --full_path.")
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """Text files."""

    caption_extension: str = option(".caption", metavar="EXT", help="Suffix of the text file beside each image.")
    caption_extention: str | None = option(
        None, metavar="EXT", help="Old, misspelt name of --caption_extension; wins when given."
    )
    missing_files: str = option(
        "skip",
        choices=("skip", "refuse"),
        help="What to do about images without a text file: list and skip them, or write nothing at all.",
    )

    def settled(self) -> "TextOptions":
        """The same, with one suffix that starts with a dot."""
        extension = caption_suffix(self.caption_extension, self.caption_extention)
        return replace(self, caption_extension=extension, caption_extention=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowOptions:
    """What is shown."""

    dry_run: bool = option(False, help="Show what would change, and write nothing.")
    debug: bool = option(False, help="Print every result.")


class Options(Protocol):
    """The options of a merging tool."""

    @property
    def place(self) -> PlaceOptions: ...  # noqa: D102
    @property
    def text(self) -> TextOptions: ...  # noqa: D102
    @property
    def show(self) -> ShowOptions: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionOptions:
    """Options of the tool for captions."""

    place: PlaceOptions
    text: TextOptions
    show: ShowOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class TagOptions:
    """Options of the tool for tags, which taggers write to ``.txt`` files."""

    place: PlaceOptions
    text: TextOptions = TextOptions(caption_extension=".txt")
    show: ShowOptions = ShowOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What the text files of a folder of images hold.

    Attributes:
        found: The text of each image that has one, without surrounding spaces; line ends inside stay.
        missing: Images without a text file.
        broken: Text files that cannot be read, and why.
    """

    found: Mapping[Path, str]
    missing: Sequence[Path]
    broken: Mapping[Path, str]


def merge(argv: Sequence[str], kind: type[Options], *, field: str, prog: str, description: str) -> int:
    """Run a merging tool; returns its exit code.

    Args:
        argv: Its command line.
        kind: Its options.
        field: The field of the metadata that its text files hold.
        prog: Its name.
        description: What it does, for ``--help``.

    Raises:
        UserError: There is nothing to merge, or a file cannot be used; nothing is written then.
    """
    set_up_logging(ConsoleOptions())
    words, rest = split_positions(kind, argv)
    order = ("train_data_dir", "out_json")
    given = [*name_positions(words, order), *rest]
    options = parse_options(kind, given, prog=f"{prog} {' '.join(order)}", description=description)
    place = options.place
    assert place.train_data_dir is not None, "asked for with the options"
    assert place.out_json is not None, "asked for with the options"
    check_writable(place.out_json)
    source = place.in_json or (place.out_json if place.out_json.exists() else None)
    before: Metadata = {} if source is None else read_entries(source)
    images = find_images(place.train_data_dir, recursive=place.recursive)
    check_names(images)
    texts = read_texts(images, options.text.caption_extension)
    _judge(texts, options)
    after = deepcopy(before)
    for image, text in texts.found.items():
        after.setdefault(key_of(image, full_path=place.full_path), {})[field] = text
        if options.show.debug:
            print(f"{image}: {text}")
    _tell_keys(before, list(texts.found), full_path=place.full_path)
    store(place.out_json, before, after, source=source, dry_run=options.show.dry_run)
    for path, reason in texts.broken.items():
        log.error("skipped: %s: %s", path, reason)
    return SKIPPED if texts.broken else 0


def read_texts(images: Sequence[Path], extension: str) -> Texts:
    """The text file of each of ``images``.

    Args:
        images: The images.
        extension: Suffix of the text files, with its dot; its case does not matter.
    """
    index = _listings(images)
    found: dict[Path, str] = {}
    missing: list[Path] = []
    broken: dict[Path, str] = {}
    for image in tqdm(images, desc="reading text files", unit="file", disable=None, leave=False):
        name = caption_name(image.name, extension, index[image.parent])
        if name is None:
            missing.append(image)
            continue
        path = image.with_name(name)
        try:
            found[image] = read_text(path).strip()
        except UnreadableCaptionError as error:
            broken[path] = f"{error}; save it as UTF-8"
        except OSError as error:
            broken[path] = error.strerror or str(error)
    return Texts(found=found, missing=missing, broken=broken)


def _listings(images: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """The files of each folder of ``images``, to be searched."""
    return {folder: index_names(os.listdir(folder)) for folder in dict.fromkeys(image.parent for image in images)}


def _judge(texts: Texts, options: Options) -> None:
    """Tell of what is missing; refuse where nothing is left, or where that was asked for."""
    extension, names = options.text.caption_extension, [str(image) for image in texts.missing]
    if texts.missing and not texts.found and not texts.broken:
        raise UserError(
            f"no image in '{options.place.train_data_dir}' has a {extension} file",
            where="--caption_extension",
            remedy=_other_extension(texts.missing) or "Make the text files first, or give another folder.",
        )
    if names and options.text.missing_files == "refuse":
        raise UserError.of(
            Problem(f"no {extension} file", name, "Write one, or use --missing_files=skip.") for name in names
        )
    for name in names:
        log.warning("no %s file, skipped: %s", extension, name)
    empty = [str(image) for image, text in texts.found.items() if not text]
    if empty:
        log.warning("%d text files are empty: %s", len(empty), quoted(empty))


def _other_extension(images: Sequence[Path]) -> str:
    """Advice, where the text files seem to have another suffix."""
    counts: defaultdict[str, int] = defaultdict(int)
    index = _listings(images)
    for image in images:
        for suffix in CAPTION_SUFFIXES:
            counts[suffix] += caption_name(image.name, suffix, index[image.parent]) is not None
    best = max(counts, key=lambda suffix: counts[suffix])
    return f"There are {counts[best]} {best} files: did you mean --caption_extension={best}?" if counts[best] else ""


def _tell_keys(before: Metadata, images: list[Path], *, full_path: bool) -> None:
    """Say where several images would share an entry, or one image have two."""
    shared = shared_keys(images, full_path=full_path)
    if shared:
        log.warning(
            "%d names belong to several images, which share one entry: %s. Add --full_path to tell them apart.",
            len(shared),
            quoted(shared),
        )
    others = [key for key in before if any(mark in key for mark in _SEPARATORS) != full_path]
    if others and images and len(others) == len(before) and not full_path:
        log.warning("the entries so far are called by paths (%s): add --full_path, or images have two", quoted(others))
    elif others and images and len(others) == len(before):
        log.warning(
            "the entries so far are called by names (%s): leave --full_path out, or images have two", quoted(others)
        )
