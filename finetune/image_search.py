"""Which images a tool works on."""

import os
from pathlib import Path

from library.data.folders import explain_image_dir, image_names
from library.errors import Problem, UserError, raise_if_any


def find_images(folder: Path, *, recursive: bool) -> list[Path]:
    """The images in ``folder``, written as the folder is (relative paths stay so), sorted by path.

    Args:
        folder: Where to look.
        recursive: Look in the folders inside it, too; hidden ones and links to folders are left out.

    Raises:
        UserError: There is no such folder, or no image in it.
    """
    folders = [folder]
    if recursive:
        folders = []
        for parent, inside, _ in os.walk(folder):
            inside[:] = [name for name in inside if not name.startswith(".")]
            folders.append(Path(parent))
    images = sorted((parent / name for parent in folders for name in image_names(parent)), key=str)
    if not images:
        advice = explain_image_dir(folder, setting="'{}'")
        assert advice is not None, "a folder without images has an explanation"
        remedy = (
            advice.remedy if recursive else f"{advice.remedy} With --recursive the folders inside are searched, too."
        )
        raise UserError(advice.what, where="train_data_dir", remedy=remedy)
    return images


def check_names(images: list[Path]) -> None:
    """Refuse names that a metadata file cannot hold.

    Raises:
        UserError: A path holds bytes that are no text.
    """
    problems = []
    for image in images:
        try:
            str(image).encode()
        except UnicodeEncodeError:
            shown = str(image).encode("utf-8", "backslashreplace").decode()
            problems.append(Problem("the file name is no text", shown, "Rename the file."))
    raise_if_any(problems)


def key_of(image: Path, *, full_path: bool) -> str:
    """What a metadata file calls ``image``: its path as it was found, or its name without folder and suffix."""
    return str(image) if full_path else image.stem


def shared_keys(images: list[Path], *, full_path: bool) -> list[str]:
    """The keys that several of ``images`` would have, sorted."""
    keys = [key_of(image, full_path=full_path) for image in images]
    return sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
