"""Files that are there and cannot be read: what is wrong with each, and what to do about it."""

from pathlib import Path

from library.data.caption_files import LongCaptionError, UnreadableCaptionError
from library.data.findings import Finding, error
from library.data.image_headers import UnreadableImageError


def unreadable_caption(path: Path, problem: Exception) -> Finding:
    """The error of a caption file, by what reading it raised."""
    if isinstance(problem, LongCaptionError):
        return error(f"the caption cannot be read: {problem}", str(path), "Shorten it, or remove the file.")
    if isinstance(problem, UnreadableCaptionError):
        remedy = "Open the file in an editor and save it with the encoding UTF-8."
        return error(f"the caption cannot be read: {problem}", str(path), remedy)
    what, remedy = _told_by_system(path, problem)
    return error(f"the caption cannot be read: {what}", str(path), remedy)


def unreadable_image(path: Path, problem: UnreadableImageError) -> Finding:
    """The error of an image file, by what reading its header raised."""
    what, remedy = str(problem), "Replace the file with a whole copy, or remove it."
    # A decoder's own errors carry no number of the system.
    if isinstance(problem.__cause__, OSError) and problem.__cause__.errno is not None:
        what, remedy = _told_by_system(path, problem.__cause__)
    return error(f"the image cannot be read: {what}", str(path), remedy)


def _told_by_system(path: Path, problem: Exception) -> tuple[str, str]:
    """What is wrong and what to do where the system refused to open or read ``path``."""
    match problem:
        case FileNotFoundError() if path.is_symlink():
            return "it is a link, and the file it leads to is missing", "Put that file back, or remove the link."
        case FileNotFoundError():
            return "it was there a moment ago and is gone", "Put it back, and leave the folder alone during the start."
        case PermissionError():
            return "you may not read it", "Change the permissions of the file so that you may read it, or remove it."
        case IsADirectoryError():
            return "it is a folder that is called like a file", "Rename the folder, or move it elsewhere."
        case OSError(strerror=str(reason)):
            return reason, "Check the disk or the network drive, or replace the file."
    return str(problem), "Replace the file, or remove it."
