"""The manifest of a run: a JSON file that says what made a result, and by which hashes it is known again."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from library.errors import UserError
from library.files import TORCH_SUFFIXES, read_tensors, sha256_of_file
from library.tensor_headers import stored_tensors
from library.training import states
from library.training.fingerprint import changes

FORMAT: Final = 1
SUFFIX: Final = "run.json"

_WEIGHTS: Final = (".safetensors", *TORCH_SUFFIXES)
_MOST_PROCESSES: Final = 4096
_MOST_LEVELS: Final = 40


def _has(value: Any, **kinds: type) -> bool:
    """Whether a JSON value is a table with at least these entries."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _each(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a JSON value is a table whose every entry fits."""
    return isinstance(value, dict) and all(fits(one) for one in value.values())


def _listed(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a JSON value is a list whose every entry fits."""
    return isinstance(value, list) and all(fits(one) for one in value)


def _is_subset(value: Any) -> bool:
    known = _has(value, dataset=int, subset=int, folder=str, images=int, digest=str)
    return known and _each(value.get("files", {}), _is_text)


def _is_part(value: Any) -> bool:
    known = _has(value, steps=list, outcome=str) and [type(step) for step in value["steps"]] == [int, int]
    return known and _listed(value.get("changed_afterwards", []), _is_text)


def _is_input(value: Any) -> bool:
    return _has(value, used_as=list) and _listed(value["used_as"], _is_text) and _each(value.get("files", {}), _is_text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any, most: int) -> bool:
    return isinstance(value, int) and 0 < value <= most


_FITS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "script": _is_text,
    "outcome": _is_text,
    "seed": lambda value: isinstance(value, int),
    "processes": lambda value: _is_number(value, _MOST_PROCESSES),
    "options": lambda value: isinstance(value, dict),
    "inputs": lambda value: _each(value, _is_input),
    "data": lambda value: _has(value, digest=str) and _listed(value.get("subsets"), _is_subset),
    "environment": lambda value: _has(value, packages=dict) and _is_number(value.get("threads"), 1 << 16),
    "steps": lambda value: _has(value, done=int, total=int),
    "results": lambda value: _each(value, lambda one: _has(one, tensors=str, step=int)),
    "states": lambda value: _each(value, lambda one: _has(one, sha256=str, step=int)),
    "parts": lambda value: _listed(value, _is_part),
}
"""What each entry that is asked for without looking must be."""


def manifest_path(folder: Path, name: str | None) -> Path:
    """Where the manifest of a run goes: ``<name>.run.json``, or ``run.json`` without a name."""
    return folder / (f"{name}.{SUFFIX}" if name else SUFFIX)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at ``path``, with everything in it that is asked for without looking.

    Raises:
        UserError: It is missing or no manifest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"file not found: {path.name}", where=str(path), remedy=_nearby(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the manifest cannot be read: {error}", where=str(path), remedy=_nearby(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int) or _is_nested(content):
        raise UserError("this is no manifest of a run", where=str(path), remedy=_nearby(path))
    if content["format"] != FORMAT:
        raise UserError(
            f"the manifest has format {content['format']}, and this program reads {FORMAT}",
            where=str(path),
            remedy="Use the version of the program that the run was made with.",
        )
    wrong = [name for name, fits in _FITS.items() if not fits(content.get(name))]
    if wrong:
        raise UserError(
            f"the manifest does not hold what it must: {', '.join(wrong)}", where=str(path), remedy=_nearby(path)
        )
    return content


def _is_nested(content: Any) -> bool:
    """Whether a JSON value is deeper than any manifest."""
    level = [content]
    for _ in range(_MOST_LEVELS):
        tables = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [value for table in tables for value in table]
    return bool(level)


def _nearby(path: Path) -> str:
    found = sorted(one.name for one in path.parent.glob(f"*{SUFFIX}") if one != path) if path.parent.is_dir() else []
    return f"Manifests there: {', '.join(found)}." if found else "A run writes it beside its result: NAME.run.json."


def tensor_hash(path: Path) -> str:
    """SHA-256 over names, shapes, number formats and bytes of the tensors of a model, whatever else is in its files.

    Of a model that is a folder, all its weights count.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _WEIGHTS)
        parts = (f"{file.relative_to(path).as_posix()} {tensor_hash(file)}\n" for file in files)
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    digest = hashlib.sha256()
    for part in stored_tensors(path) if path.suffix.lower() == ".safetensors" else _tensors_of_torch(path):
        digest.update(part)
    return digest.hexdigest()


def _tensors_of_torch(path: Path) -> Iterator[bytes | memoryview]:
    import torch

    for name, tensor in sorted(read_tensors(path, mapped=True).tensors.items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def state_hash(folder: Path) -> str:
    """What a state is known by: its own list of files and their hashes."""
    return sha256_of_file(folder / states.MANIFEST)


def part_before(state: Path, *, own: Path, seed: int) -> dict[str, Any] | None:
    """The manifest of the run that saved ``state``, looked for beside it; None where there is none.

    A run that was killed may have saved the state and not told of it.

    Args:
        state: The state's folder.
        own: Where the manifest of the run that goes on will be.
        seed: Seed of that run.
    """
    found = dict(_readable(state.parent))
    for content in found.values():
        entry = content["states"].get(state.name)
        if entry is not None and entry["sha256"] == state_hash(state):
            return content
    killed = found.get(own) or {}
    return killed if (killed.get("outcome"), killed.get("seed")) == ("running", seed) else None


def _readable(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with suppress(UserError):
            yield path, read_manifest(path)


def parts_so_far(before: Mapping[str, Any], manifest: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """The parts of a run that is continued at ``step``: those of the one before, and that itself.

    Args:
        before: Its manifest.
        manifest: The new one, with its options and data.
        step: Steps that are done.
    """
    first = before["parts"][-1]["steps"][1] if before["parts"] else 0
    part = {
        "steps": [first, step],
        "outcome": before["outcome"],
        "begun": before.get("begun"),
        "environment": before["environment"],
        "processes": before["processes"],
        "changed_afterwards": _changes(before, manifest),
    }
    return [*before["parts"], part]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes a continued run another than one that was not stopped, a line each."""
    found = changes({"options": before["options"]}, {"options": now["options"]})
    total, new_total = (one["steps"]["total"] for one in (before, now))
    more = {
        f"{total} steps in all -> {new_total}": total != new_total,
        "the data set file": before.get("dataset") != now.get("dataset"),
        "the images or captions": before["data"]["digest"] != now["data"]["digest"],
    }
    return [*found.defining, *found.harmless, *(what for what, holds in more.items() if holds)]


def result_differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Names of results that are equal, that differ, and that only the first of two runs has."""
    both = [name for name in before if name in now]
    equal = [name for name in both if before[name]["tensors"] == now[name]["tensors"]]
    return equal, [name for name in both if name not in equal], [name for name in before if name not in now]
