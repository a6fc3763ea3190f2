"""Metadata files: captions, tags and training sizes of many images in one JSON or JSON Lines file.

``{"path or name of an image": {"caption": "...", "tags": "...", "train_resolution": [width, height]}}``, or in a
``.jsonl`` file one object a line with the path under ``image_path``. Keys are full paths, paths relative to the image
folder, or such paths without the image's suffix. Where the image is gone, its latents (``.npz``) take its place. Files
are only ever read from the places that keys name.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from library.data.caption_files import LONGEST_TEXT
from library.data.findings import Finding, error, warning
from library.data.folders import explain_image_dir, image_names
from library.data.latent_files import LatentNames, check_latents, is_latent_file, judge_latents
from library.data.spec import Size, SubsetSpec, size_objection
from library.documents import DocumentError, decode_text, is_text, load_json, printable
from library.wording import named

_MOST_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """What a metadata file says of one image.

    Attributes:
        key: As it is written.
        caption: May have several lines; "" when there is none.
        tags: Separated by commas; "" when there are none.
        train_resolution: Size to train at, if the file has one.
    """

    key: str
    caption: str = ""
    tags: str = ""
    train_resolution: Size | None = None


@dataclass(frozen=True, slots=True)
class DescribedImage:
    """An image file and what is said of it.

    Attributes:
        path: The file, as it can be opened from the current directory; or the latents in the place of the image.
        caption: Its caption; several lines are alternatives. None when nothing is said.
        tags: The tags alone, for statistics; None when they are not told apart from the caption.
        bucket: Size to train at; None leaves it to the bucket rules.
        size: Size of the image as displayed, where it is not to be read from the file.
    """

    path: Path
    caption: str | None
    tags: str | None = None
    bucket: Size | None = None
    size: Size | None = None


def described_images(subset: SubsetSpec) -> tuple[list[DescribedImage], list[Finding]]:
    """The images of a subset with a metadata file, sorted by path, and what is wrong with the file."""
    assert subset.metadata_file is not None, "asked for such subsets only"
    if not subset.metadata_file.is_file():
        return [], [_missing_file(subset.metadata_file, subset.where)]
    entries, findings = read_metadata(subset.metadata_file)
    if not entries and not findings:
        findings.append(error("the metadata file names no image", str(subset.metadata_file), "Fill it, or remove it."))
    matched, unmatched = _match(entries, subset.image_dir)
    if unmatched:
        findings.append(_not_found(unmatched, len(entries), subset))
    findings.extend(_judge_matches(matched, subset))
    with_sizes = all(entry.train_resolution for _, entry in matched)
    images: list[DescribedImage] = []
    broken: list[Finding] = []
    for path, entry in matched:
        image = _described(Path(path), entry, subset)
        if is_latent_file(image.path):
            sizes, wrong = check_latents(image.path, subset, entry.train_resolution)
            broken.extend(wrong)
            if sizes is not None:
                images.append(replace(image, size=sizes[0], bucket=sizes[1]))
        else:
            images.append(image if with_sizes else replace(image, bucket=None))
    findings.extend(_shortened(broken, subset.metadata_file))
    latents = [Path(path) for path, _ in matched if is_latent_file(Path(path))]
    findings.extend(judge_latents(latents, len(entries), subset))
    return sorted(images, key=lambda image: str(image.path)), findings


def _described(path: Path, entry: MetadataEntry, subset: SubsetSpec) -> DescribedImage:
    rules = subset.captions
    caption = caption_text(entry, separator=rules.caption_separator, all_lines=rules.enable_wildcard) or None
    return DescribedImage(path, caption, tags=", ".join(_lines(entry.tags)), bucket=entry.train_resolution)


def caption_text(entry: MetadataEntry, *, separator: str, all_lines: bool) -> str:
    """Caption and tags as one caption: ``caption, tags``.

    Args:
        entry: The entry; line ends within its tags separate tags, too.
        separator: What stands between tags; a space is put behind it.
        all_lines: Join the tags to every line of the caption (for wildcards) instead of to the first alone.
    """
    joint = f"{separator.rstrip()} "
    tags = joint.join(_lines(entry.tags))
    captions = _lines(entry.caption) or [""]
    return "\n".join(
        joint.join(part for part in (caption, tags) if part) for caption in (captions if all_lines else captions[:1])
    )


def _lines(text: str) -> list[str]:
    """The lines that are not blank, without surrounding spaces."""
    return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


# --- reading the file ---


def read_metadata(path: Path) -> tuple[list[MetadataEntry], list[Finding]]:
    """The entries of a metadata file in its order, and what is wrong with it; wrong entries are left out.

    Args:
        path: An existing file: one JSON object, or one object a line where its suffix is ``.jsonl`` or its first line
            is an object with ``image_path``.
    """
    try:
        text = decode_text(path.read_bytes())
    except DocumentError as mistake:
        what = f"the metadata file cannot be read: {mistake}"
        return [], [error(what, str(path), "Open it in an editor and save it with the encoding UTF-8.")]
    except OSError as mistake:
        return [], [error(f"the metadata file cannot be read: {mistake.strerror}", str(path), "Check the path.")]
    reader = _Reader(path, text)
    entries = list(reader.json_lines() if is_json_lines(path, text) else reader.json_object())
    return entries, _shortened(reader.findings, path)


def is_json_lines(path: Path, text: str) -> bool:
    """Whether ``text``, the content of the metadata file ``path``, is one object a line; see :func:`read_metadata`."""
    if path.suffix.lower() == ".jsonl":
        return True
    first = text.lstrip().split("\n", 1)[0]
    try:
        entry = load_json(first)
    except DocumentError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("image_path"), str)


def largest_train_resolution(files: Iterable[Path]) -> Size | None:
    """The train_resolution of the largest area in metadata files, if every entry of every file has one."""
    entries = [entry for file in files if file.is_file() for entry in read_metadata(file)[0]]
    sizes = [entry.train_resolution for entry in entries if entry.train_resolution is not None]
    return max(sizes, key=lambda size: size[0] * size[1]) if sizes and len(sizes) == len(entries) else None


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns the text of a metadata file into entries and collects what is wrong."""

    path: Path
    text: str
    findings: list[Finding] = field(default_factory=list)

    def json_object(self) -> Iterator[MetadataEntry]:
        repeated: list[str] = []

        def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            table = dict(pairs)
            if len(table) < len(pairs):
                repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            return table

        try:
            content = load_json(self.text, object_pairs_hook=without_repeats)
        except DocumentError as mistake:
            remedy = "Mend that line, or give the right file."
            self._report(f"the file cannot be read: {mistake}", mistake.line or 1, remedy)
            return
        if not isinstance(content, dict):
            self._report("the file holds no JSON object", 1, 'Write {"image.png": {"caption": "..."}, ...}.')
            return
        if repeated:
            self.findings.append(
                warning(
                    f"{len(repeated)} keys are given twice, and only the last of each counts: {_named(repeated)}",
                    str(self.path),
                    "Remove the others.",
                )
            )
        for key, value in content.items():
            yield from self._entry(key, value, None)

    def json_lines(self) -> Iterator[MetadataEntry]:
        for number, line in enumerate(self.text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = load_json(line)
            except DocumentError as mistake:
                self._report(f"the line cannot be read: {mistake}", number, "Write one JSON object a line.")
                continue
            key = value.get("image_path") if isinstance(value, dict) else None
            if isinstance(key, str):
                yield from self._entry(key, value, number)
            else:
                self._report("the line has no image_path", number, 'Write {"image_path": "...", "caption": "..."}.')

    def _entry(self, key: str, value: object, line: int | None) -> Iterator[MetadataEntry]:
        """The entry, or none and a finding."""

        def report(what: str, remedy: str) -> None:
            # Of many mistakes few are told, and looking for a line takes time.
            found = line or (self._line_of(key) if len(self.findings) < _MOST_NAMED else 1)
            self._report(f"{what} ('{printable(key)}')", found, remedy)

        if not isinstance(value, Mapping):
            report("an entry must be an object", 'Write {"caption": "..."}.')
        elif not is_text(key):
            report("a key is no path", "Remove the entry.")
        elif wrong := [name for name in ("caption", "tags") if not _is_caption(value.get(name) or "")]:
            report(f"{wrong[0]} must be text of at most {LONGEST_TEXT} bytes", f'Write "{wrong[0]}": "...".')
        else:
            try:
                size = _train_resolution(value.get("train_resolution"))
            except ValueError as mistake:
                report(f"train_resolution must be two whole numbers: {mistake}", "Write for example [512, 768].")
                return
            yield MetadataEntry(key, value.get("caption") or "", value.get("tags") or "", size)

    def _line_of(self, key: str) -> int:
        """The line on which ``key`` stands, as far as it can be found by its text."""
        places = (self.text.find(json.dumps(key, ensure_ascii=ascii_only)) for ascii_only in (True, False))
        place = next((place for place in places if place >= 0), 0)
        return self.text.count("\n", 0, place) + 1

    def _report(self, what: str, line: int, remedy: str) -> None:
        self.findings.append(error(what, f"{self.path}:{line}", remedy))


def _is_caption(value: object) -> bool:
    return isinstance(value, str) and is_text(value) and len(value.encode()) <= LONGEST_TEXT


def _train_resolution(value: object) -> Size | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("width and height")
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in value):
        raise ValueError("pixels without fractions")
    if objection := size_objection((value[0], value[1])):
        raise ValueError(objection)
    return value[0], value[1]


# --- finding the images ---


def _match(
    entries: Sequence[MetadataEntry], image_dir: Path
) -> tuple[list[tuple[str, MetadataEntry]], list[MetadataEntry]]:
    """The entries with the paths of their images, or else of their latents, and those with neither."""
    listings = _Listings()
    matched: list[tuple[str, MetadataEntry]] = []
    unmatched: list[MetadataEntry] = []
    for entry in entries:
        candidates = list(_candidates(entry.key, image_dir))
        found = (look(path) for look in (listings.image, listings.latents) for path in candidates)
        path = next((path for path in found if path is not None), None)
        if path is None:
            unmatched.append(entry)
        else:
            matched.append((path, entry))
    return matched, unmatched


def _candidates(key: str, image_dir: Path) -> Iterator[str]:
    """Where the image of ``key`` may be: in the image folder, or as the current directory has it."""
    for written in dict.fromkeys((key, key.replace("\\", "/"))):
        yield os.path.join(image_dir, written)
        yield written


@dataclass(frozen=True, slots=True)
class _Listings:
    """The images and the files of latents of each folder, listed once."""

    by_folder: dict[str, Mapping[str, str]] = field(default_factory=dict)
    latents_by_folder: dict[str, LatentNames] = field(default_factory=dict)

    def image(self, path: str) -> str | None:
        """The image at ``path``, or the first that is called like it but for a suffix."""
        folder, name = os.path.split(path)
        if folder not in self.by_folder:
            names = image_names(Path(folder))
            stems = {os.path.splitext(image)[0]: image for image in reversed(names)}
            self.by_folder[folder] = stems | {image: image for image in names}
        found = self.by_folder[folder].get(name)
        return os.path.join(folder, found) if found is not None else None

    def latents(self, path: str) -> str | None:
        """The latents of the image at ``path``."""
        folder, name = os.path.split(path)
        if folder not in self.latents_by_folder:
            self.latents_by_folder[folder] = LatentNames.of(Path(folder))
        found = self.latents_by_folder[folder].of_image(name)
        return os.path.join(folder, found) if found is not None else None


# --- what is said about them ---


def _missing_file(path: Path, where: str) -> Finding:
    if path.is_dir():
        return error(f"'{path}' is a folder, not a metadata file", where, "Give the .json file in it.")
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    remedy = f"Did you mean '{path.parent / near[0]}'?" if near else "Check the path."
    return error(f"metadata file not found: '{path}'", where, remedy)


def _not_found(entries: Sequence[MetadataEntry], count: int, subset: SubsetSpec) -> Finding:
    file = str(subset.metadata_file)
    what = f"{len(entries)} of {count} entries match no image: {_named([entry.key for entry in entries])}"
    advice = None if subset.image_dir.is_dir() else explain_image_dir(subset.image_dir, setting="'{}'")
    if advice:
        return error(f"{what}; {advice.what}", file, advice.remedy)
    stems = {os.path.splitext(name)[0] for name in image_names(subset.image_dir)}
    names = [entry.key.replace("\\", "/").rsplit("/", 1)[-1] for entry in entries]
    here = sum(os.path.splitext(name)[0] in stems or name in stems for name in names)
    if here:
        return error(
            what,
            file,
            f"Images of the names of {here} of them are in '{subset.image_dir}': write the keys as those files are "
            "called, without a folder.",
        )
    return error(what, file, f"Put the images into '{subset.image_dir}', give the right image_dir, or remove the keys.")


def _judge_matches(matched: Sequence[tuple[str, MetadataEntry]], subset: SubsetSpec) -> Iterator[Finding]:
    file = str(subset.metadata_file)
    silent = [entry.key for _, entry in matched if not _lines(entry.caption) and not _lines(entry.tags)]
    if silent:
        yield warning(
            f"{len(silent)} of {len(matched)} entries have neither caption nor tags and are trained with an empty "
            f"caption: {_named(silent)}",
            file,
            "Write captions or tags, or leave it so if it is meant.",
        )
    longer = [entry.key for _, entry in matched if len(_lines(entry.caption)) > 1]
    if longer and not subset.captions.enable_wildcard:
        yield warning(
            f"{len(longer)} captions have several lines, and only the first is used: {_named(longer)}",
            file,
            "Write one line, or set enable_wildcard = true to choose a line at random each time.",
        )
    twice = [path for path, count in Counter(path for path, _ in matched).items() if count > 1]
    if twice:
        yield warning(
            f"{len(twice)} images have several entries and are trained once for each: "
            f"{_named([os.path.basename(path) for path in twice])}",
            file,
            "Keep one entry an image.",
        )
    sized = sum(entry.train_resolution is not None for _, entry in matched)
    if 0 < sized < len(matched):
        yield warning(
            f"{sized} of {len(matched)} entries have a train_resolution; it is used only where all have one",
            file,
            "Remove it, or write it for every image.",
        )


def unlisted_images(subset: SubsetSpec, used: Collection[Path]) -> Iterator[Finding]:
    """Images in the folder of a subset with a metadata file that are not trained on.

    Args:
        subset: The subset.
        used: The files of all records, so that two metadata files may share a folder.
    """
    assert subset.metadata_file is not None, "asked for such subsets only"
    names = image_names(subset.image_dir)
    # Keys may spell the same folder in another way.
    folders = {folder for folder in {path.parent for path in used} if _is_same_folder(folder, subset.image_dir)}
    used_names = {path.name for path in used if path.parent in folders}
    unlisted = [name for name in names if name not in used_names]
    # Without a single match the keys are wrong, and that is said already.
    if unlisted and len(unlisted) < len(names):
        yield warning(
            f"{len(unlisted)} of {len(names)} images in '{subset.image_dir}' have no entry and are not trained on: "
            f"{_named(unlisted)}",
            str(subset.metadata_file),
            "Add them to the metadata file, or leave it so if it is meant.",
        )


def _is_same_folder(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _shortened(findings: list[Finding], path: Path) -> list[Finding]:
    """The first few of many mistakes, and one that counts the rest."""
    if len(findings) <= _MOST_NAMED:
        return findings
    rest = len(findings) - _MOST_NAMED
    return [*findings[:_MOST_NAMED], error(f"{rest} more mistakes of this kind", str(path), "Mend them alike.")]


def _named(names: Sequence[str]) -> str:
    return named([f"'{name}'" for name in names], _MOST_NAMED)
