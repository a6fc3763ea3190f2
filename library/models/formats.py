"""What a trained model is saved as: the format, its suffix, and whether a place is free. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from library.documents import home_expanded
from library.errors import Problem

ModelFormat = Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"]
"""A single file in the checkpoint layout, or a Diffusers folder with torch files or safetensors files in it."""

METADATA_FILE: Final = "training_metadata.json"
"""The file of a Diffusers folder that holds what a single file has in its safetensors header."""

_SUFFIXES: Final[Mapping[ModelFormat, str]] = {
    "ckpt": ".ckpt",
    "safetensors": ".safetensors",
    "diffusers": "",
    "diffusers_safetensors": "",
}


def model_format(save_model_as: str | None, use_safetensors: bool, source: str | Path) -> ModelFormat:
    """The format of the results.

    Args:
        save_model_as: The value of ``--save_model_as``; as the input when absent.
        use_safetensors: ``--use_safetensors``: safetensors where the format is left open, by ``diffusers`` or by the
            input.
        source: The base model: a file, a Diffusers folder or a hub id (saved as a folder).
    """
    if save_model_as is None:
        path = home_expanded(Path(source))
        if path.is_file():
            return "safetensors" if use_safetensors or path.suffix.lower() == ".safetensors" else "ckpt"
        return "diffusers_safetensors" if use_safetensors else "diffusers"
    known: dict[str, ModelFormat] = {name: name for name in _SUFFIXES}
    chosen = known[save_model_as]
    return "diffusers_safetensors" if chosen == "diffusers" and use_safetensors else chosen


def suffix_of(format: ModelFormat) -> str:
    """The end of the results' names: ``.ckpt``, ``.safetensors``, or nothing for folders."""
    return _SUFFIXES[format]


def format_notices(save_model_as: str | None, use_safetensors: bool) -> list[str]:
    """Whether ``--use_safetensors`` contradicts ``--save_model_as``, which counts."""
    if save_model_as == "ckpt" and use_safetensors:
        return ["without effect with --save_model_as ckpt: --use_safetensors"]
    return []


def is_trained_folder(path: Path) -> bool:
    """Whether ``path`` is a Diffusers folder that training wrote, and so may be replaced by a newer one."""
    return all((path / name).is_file() for name in (METADATA_FILE, "model_index.json"))


def format_of_name(path: Path, *, safetensors: bool) -> ModelFormat:
    """The format that the name of a result asks for: ``.safetensors`` and ``.ckpt`` are files, any other is a folder.

    Args:
        path: The name.
        safetensors: Whether a folder has its weights in safetensors files.
    """
    folder: ModelFormat = "diffusers_safetensors" if safetensors else "diffusers"
    named: dict[str, ModelFormat] = {suffix: name for name, suffix in _SUFFIXES.items() if suffix}
    return named.get(path.suffix.lower(), folder)


def overwriting_problems(target: Path, *, source: Path | None, where: str) -> list[Problem]:
    """What stands against writing a model made from ``source`` to ``target``, which may have something already."""
    if not target.exists():
        return []
    if source is not None and target.samefile(source):
        return [Problem("the model would replace itself", where, "Give another name.")]
    is_file = bool(suffix_of(format_of_name(target, safetensors=False)))
    if target.is_file() if is_file else is_trained_folder(target):
        return []
    what = f"{target.name} is {'a folder' if target.is_dir() else 'a file'} that this program did not write"
    return [Problem(f"{what}, and it is not replaced", where, "Give another name, or move what has it.")]


def check_target(path: Path, format: ModelFormat) -> list[Problem]:
    """What stands against giving a result the name ``path``: a folder or file of another kind that has it already."""
    is_folder = suffix_of(format) == ""
    if not path.exists() or (is_trained_folder(path) if is_folder else path.is_file()):
        return []
    what = "a folder" if path.is_dir() else "a file"
    return [
        Problem(
            f"{path.name} is {what} that training did not write, and it is not replaced",
            where="--output_name",
            remedy="Choose another name for the result, or move what has it.",
        )
    ]
