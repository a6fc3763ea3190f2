"""Folders of images: which files count, ``<repeats>_<class>`` names, and what a wrong path was probably meant to be."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from library.wording import named

PLUGINS: Final[Mapping[str, str]] = MappingProxyType({".jxl": "pillow_jxl"})
"""Formats that Pillow reads when a module is installed."""

IMAGE_SUFFIXES: Final = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff")) | frozenset(
    suffix for suffix, module in PLUGINS.items() if find_spec(module)
)
UNREAD_IMAGE_SUFFIXES: Final = frozenset((".gif", ".heic", ".heif", ".jxl", ".psd", ".raw", ".svg")) - IMAGE_SUFFIXES

IMAGE_FORMATS: Final = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP") + tuple(
    suffix.removeprefix(".").upper() for suffix in PLUGINS if suffix in IMAGE_SUFFIXES
)
"""What is decoded, whatever a file is called: Pillow knows formats besides that are programs, or are read by others."""

_Test: TypeAlias = Callable[[Path], bool]

_SHOWN: Final = 3
_MOST_SUBFOLDERS: Final = 200


@dataclass(frozen=True, slots=True)
class Advice:
    """What is wrong with a folder, and what to do about it."""

    what: str
    remedy: str


def is_image(name: str) -> bool:
    """Whether a file of this name is read as a training image (hidden files are not)."""
    # Quicker than to split every name of a large folder; without a dot this is its last letter.
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def enable_format(path: Path) -> None:
    """Load what Pillow needs beyond itself to read ``path``."""
    module = PLUGINS.get(path.suffix.lower())
    if module is not None and find_spec(module):
        import_module(module)


def image_names(folder: Path) -> list[str]:
    """Names of the images directly in ``folder``, sorted; none when it is no folder."""
    return sorted(name for name in _names(folder, directories=False) if is_image(name))


def _has_images(folder: Path) -> bool:
    """Whether there are images directly in ``folder``."""
    try:
        with os.scandir(folder) as entries:
            return any(is_image(entry.name) and not entry.is_dir() for entry in entries)
    except OSError:
        return False


def subfolder_names(folder: Path) -> list[str]:
    """Names of the folders directly in ``folder``, sorted; none when it is no folder."""
    return sorted(name for name in _names(folder, directories=True) if not name.startswith("."))


def _names(folder: Path, *, directories: bool) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir() == directories]
    except OSError:
        return []


def parse_folder_name(name: str) -> tuple[int, str] | None:
    """``(repeats, class tokens)`` of a folder called ``<repeats>_<class tokens>``; None for every other name.

    The number may be written as :class:`int` reads it (``05``, ``10 ``) and must be at least 1.
    """
    number, _, tokens = name.partition("_")
    try:
        repeats = int(number)
    except ValueError:
        return None
    return (repeats, tokens) if repeats >= 1 else None


def shown_name(path: str | Path) -> str:
    """The last part of a path written for any system: what may be shown to others."""
    parts = [part for part in re.split(r"[\\/]", str(path)) if part not in ("", ".")]
    return parts[-1] if parts and parts[-1] != ".." else Path(path).resolve().name


def explain_image_dir(folder: Path, *, setting: str) -> Advice | None:
    """Why ``folder`` has no images to train on; None when it has.

    Args:
        folder: The folder that should hold images.
        setting: How the user writes it, with ``{}`` for the path (``image_dir = '{}'``).
    """
    if not folder.is_dir():
        return _explain_missing(folder, setting, wanted=_has_images)
    if _has_images(folder):
        return None
    below = _folders_below(folder, wanted=_has_images)
    if below:
        counts = _listed([f"{path.relative_to(folder)} ({len(image_names(path))})" for path in below])
        return Advice(
            f"no images directly in the folder '{folder}', but in the folders inside it: {counts}",
            _choose(setting, below, "Give the folder that holds the images themselves"),
        )
    return Advice(f"no images in the folder '{folder}', which holds {_content(folder)}", _put_images_there(folder))


def is_empty(folder: Path) -> bool:
    """Whether ``folder`` is a folder that holds nothing; of one that cannot be read it is not known."""
    try:
        return folder.is_dir() and not any(folder.iterdir())
    except OSError:
        return False


def explain_base_dir(base: Path, *, flag: str) -> Advice | None:
    """Why ``base`` has no folders called ``<repeats>_<class>``; None when it has."""
    setting = f'{flag}="{{}}"'
    if not base.is_dir():
        return _explain_missing(base, setting, wanted=_has_named_folders)
    if _has_named_folders(base):
        return None
    images = image_names(base)
    if images:
        return _explain_images_in_base(base, setting, images)
    below = _folders_below(base, wanted=_has_named_folders)
    if below:
        return Advice(
            f"no folders called '<repeats>_<class>' directly in '{base}', but one level lower: "
            f"{_listed([str(path.relative_to(base)) for path in below])}",
            _choose(setting, below, "Give the folder that holds the named folders"),
        )
    unnamed = [name for name in subfolder_names(base) if _has_images(base / name)]
    if unnamed:
        return Advice(
            f"the folders in '{base}' are not called '<repeats>_<class>': {_listed(unnamed)}",
            f"Rename '{unnamed[0]}' to '10_{unnamed[0]}' (10 repeats, trained as '{unnamed[0]}'), or describe the "
            "folders in a file given with --dataset_config.",
        )
    return Advice(
        f"no folders called '<repeats>_<class>' in '{base}', which holds {_content(base)}",
        f"Make a folder such as '10_sks dog' in '{base}' and put the images into it.",
    )


def _explain_images_in_base(base: Path, setting: str, images: Sequence[str]) -> Advice:
    what = f"'{base}' holds {len(images)} images itself; it must hold folders called '<repeats>_<class>' with images in"
    name = shown_name(base)
    if parse_folder_name(name):
        return Advice(f"{what} them", f"Give the folder above it: {setting.format(base.parent)}")
    return Advice(
        f"{what} them",
        f"Move the images into a new folder '{base / f'10_{name}'}' (10 repeats, trained as '{name}'), or give the "
        "folder as image_dir in a file given with --dataset_config.",
    )


def _has_named_folders(base: Path) -> bool:
    return any(parse_folder_name(name) for name in subfolder_names(base))


def _explain_missing(folder: Path, setting: str, *, wanted: _Test) -> Advice:
    """What stands at a path that is no folder, or the nearest name that exists."""
    if folder.is_file():
        return Advice(f"'{folder}' is a file, not a folder", f"Give the folder: {setting.format(folder.parent)}")
    slashed = Path(str(folder).replace("\\", "/"))
    if slashed.is_dir():
        return Advice(f"folder not found: '{folder}'", f"Write it with forward slashes: {setting.format(slashed)}")
    existing = next((parent for parent in folder.parents if parent.is_dir()), Path("."))
    what = f"folder not found: '{folder}'"
    if wanted(existing) and existing != Path("."):
        return Advice(what, f"The folder above it exists and fits: {setting.format(existing)}")
    missing = folder.relative_to(existing).parts[0] if folder.is_relative_to(existing) else folder.name
    near = _near(missing, subfolder_names(existing))
    if near:
        rest = folder.relative_to(existing).parts[1:] if folder.is_relative_to(existing) else ()
        candidate = (existing / near).joinpath(*rest)
        meant = candidate if candidate.is_dir() else existing / near
        return Advice(what, f"Did you mean {setting.format(meant)}?")
    inside = subfolder_names(existing)
    place = f"'{existing.resolve().name or existing}'"
    found = f"{place} exists and holds the folders {_listed(inside)}" if inside else f"{place} exists, without folders"
    return Advice(what, f"Check the path: {found}. Relative paths start at the current folder.")


def _near(name: str, names: Sequence[str]) -> str | None:
    by_lower = {candidate.lower(): candidate for candidate in names}
    matches = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def _folders_below(folder: Path, *, wanted: _Test) -> list[Path]:
    """Folders one or two levels lower that satisfy ``wanted``; the nearer level only."""
    level = [folder]
    for _ in range(2):
        level = [parent / name for parent in level for name in subfolder_names(parent)][:_MOST_SUBFOLDERS]
        found = [path for path in level if wanted(path)]
        if found:
            return found
    return []


def _choose(setting: str, folders: Sequence[Path], lead: str) -> str:
    if len(folders) == 1:
        return f"{lead}: {setting.format(folders[0])}"
    return f"{lead}, for example {setting.format(folders[0])}; each folder needs an entry of its own."


def _content(folder: Path) -> str:
    suffixes = Counter(
        os.path.splitext(name)[1].lower() or "without a suffix" for name in _names(folder, directories=False)
    )
    if not suffixes:
        return "no files"
    return "only " + ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4)) + " files"


def _put_images_there(folder: Path) -> str:
    others = {os.path.splitext(name)[1].lower() for name in _names(folder, directories=False)} & UNREAD_IMAGE_SUFFIXES
    if others:
        return f"{', '.join(sorted(others))} files are not read: convert them to .png or .jpg."
    return f"Put {', '.join(sorted(IMAGE_SUFFIXES))} files there, or remove the entry."


def _listed(names: Sequence[str]) -> str:
    return named([f"'{name}'" for name in names], _SHOWN)
