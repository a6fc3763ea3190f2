"""``metadata_cache.json``: captions and sizes of the images of a folder, kept in it for programs that look there.

``{"path of an image": {"caption": "...", "resolution": [width, height]}}``, the paths as the ``image_dir`` is written.
Nothing in it is believed: it is compared with what the images and caption files say, or said when they last changed,
and written anew where the two differ.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from library.data.findings import Finding, warning
from library.data.spec import Size
from library.documents import load_json, read_text
from library.errors import UserError
from library.files import written_whole

NAME: Final = "metadata_cache.json"

Info: TypeAlias = dict[str, dict[str, Any]]
"""What the file holds: caption and resolution of each image, by path."""


def info_of(written_dir: str, images: Sequence[tuple[str, str, Size]]) -> Info:
    """What the file of a folder should hold.

    Args:
        written_dir: The folder as the user writes it.
        images: File name, caption and displayed size of each image.
    """
    return {
        os.path.join(written_dir, name): {"caption": caption, "resolution": list(size)}
        for name, caption, size in images
    }


def keep_info(folder: Path, expected: Info) -> list[Finding]:
    """Make the file in ``folder`` hold ``expected``, and say what it held instead.

    A file that cannot be read is left as it is. Of several processes the first alone writes.
    """
    path = folder / NAME
    try:
        found = _read(path)
    except (ValueError, OSError) as problem:
        remedy = f"Mend it, or delete it: it is then written anew. Training does not need it: {NAME} only repeats what "
        return [
            warning(f"{NAME} cannot be used: {_explain(problem)}", str(path), f"{remedy}the images and captions say.")
        ]
    if found == expected or os.environ.get("RANK", "0") != "0":
        return []
    findings = [] if found is None else [_out_of_date(path, found, expected)]
    try:
        with written_whole(path) as temporary:
            temporary.write_text(_written(expected), encoding="utf-8")
    except UserError as problem:
        remedy = "Make the folder writable, or leave cache_info out: the next start is as quick without the file."
        findings.append(warning(f"{NAME} is not written: {problem.problems[0].what}", str(path), remedy))
    return findings


def _read(path: Path) -> Mapping[str, Any] | None:
    """What the file holds; None where there is no file."""
    try:
        content = load_json(read_text(path))
    except FileNotFoundError:
        return None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _explain(problem: Exception) -> str:
    if isinstance(problem, OSError):
        return problem.strerror or type(problem).__name__
    return str(problem)


def _out_of_date(path: Path, found: Mapping[str, Any], expected: Info) -> Finding:
    both = [key for key in expected if key in found]
    captions = sum(_part(found[key], "caption") != expected[key]["caption"] for key in both)
    sizes = sum(_part(found[key], "resolution") != expected[key]["resolution"] for key in both)
    counts = (
        (captions, "captions that have changed"),
        (sizes, "sizes that have changed"),
        (len(expected) - len(both), "images that were not in it"),
        (len(found) - len(both), "paths that lead to no image"),
    )
    told = ", ".join(f"{count} {what}" for count, what in counts if count) or "other entries than it should"
    return warning(
        f"{NAME} was out of date and is written anew: {told}",
        str(path),
        "Nothing needs to be done: the run uses what the images and caption files say.",
    )


def _part(entry: object, name: str) -> object:
    return entry.get(name) if isinstance(entry, dict) else None


def _written(info: Info) -> str:
    """One image a line; letters beyond ASCII escaped, which any name survives."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in info.items()) + "\n}\n"
