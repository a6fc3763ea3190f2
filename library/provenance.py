"""What a run is made of, told without paths: its options, data set file, prompts, models and images, with hashes."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from library.data.content_hashes import content_hashes
from library.documents import home_expanded
from library.models.contents import model_files, vae_files
from library.option_fields import declarations
from library.options import PRIVATE_METAVARS, to_toml
from library.training.placeholders import Placeholders
from library.training.privacy import PATH_OPTIONS, Scrubber, is_absolute, last_part

_MODELS: Final = {"pretrained_model_name_or_path": model_files, "vae": vae_files}
# Belong to an account, not to the run.
_NOT_TOLD: Final = ("async_upload", "huggingface_", "resume_from_huggingface", "save_state_to_huggingface")
# Their content is told, or they say where something goes.
_BY_NAME: Final = frozenset(
    {
        *("console_log_file", "dataset_config", "log_tracker_config", "logging_dir", "metadata_thumbnail"),
        *("offload_optimizer_nvme_path", "offload_param_nvme_path", "output_dir", "resume", "sample_prompts"),
    }
)
_PATH_KEYS: Final = ("image_dir", "metadata_file", "conditioning_data_dir")
_OF_THE_DATA: Final = frozenset({*_PATH_KEYS, "in_json", "train_data_dir", "reg_data_dir"})
"""Whatever counts of these is in the fingerprint of the data."""


def told_options(options: object, names: Placeholders, scrub: Scrubber) -> dict[str, Any]:
    """The options that are not the default, as a configuration file would hold them; no secrets, no paths."""
    declared = declarations(type(options))
    paths = {
        name
        for name, one in declared.items()
        if name in PATH_OPTIONS or one.facts.metavar in PRIVATE_METAVARS or name in _MODELS
    }

    def told(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [told(name, one) for one in value]
        if not isinstance(value, str):
            return value
        if name in _BY_NAME:
            return last_part(value)
        key, equals, rest = value.partition("=")
        if equals and key.isidentifier():
            return f"{key}={told(name, rest)}"
        if name in _MODELS and not home_expanded(Path(value)).exists():
            return value
        return names.of(value, f"--{name}") if name in paths or is_absolute(value) else scrub(value)

    given = tomllib.loads(to_toml(options))
    return {name: told(name, value) for name, value in given.items() if not name.startswith(_NOT_TOLD)}


def told_dataset(path: Path, names: Placeholders, scrub: Scrubber) -> Any:
    """The content of a dataset file without its comments and paths; as JSON it is a dataset file again."""
    text = path.read_bytes().decode("utf-8-sig")
    content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)

    def told(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: told(name, one) for name, one in value.items()}
        if isinstance(value, list):
            return [told(key, one) for one in value]
        if isinstance(value, str):
            return names.of(value, key, beside=path.parent) if key in _PATH_KEYS else scrub(value)
        return value if isinstance(value, bool | int | float) or value is None else str(value)

    return told("", content)


def told_inputs(names: Placeholders, hub_models: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """What the placeholders stand for, and models of the hub, with the hashes of what is read of them.

    Args:
        names: The placeholders.
        hub_models: Options that name a model of the hub, with its id.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in names:
        kind = "folder" if one.place.is_dir() else "file"
        found[one.name] = {"is": kind, "used_as": one.uses, "path": one.kept, **content_of(one.uses, str(one.place))}
    for option, source in hub_models:
        found[source] = {"is": "hub model", "used_as": [f"--{option}"], **content_of([f"--{option}"], source)}
    return found


def hub_models(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options, as :func:`told_options` gives them, that name a model of the hub."""
    return [(name, options[name]) for name in _MODELS if name in options and "map:" not in options[name]]


def content_of(uses: Iterable[str], source: str) -> dict[str, Any]:
    """The hashes of what is read of an input: ``sha256`` of a file, ``files`` of a folder; nothing for data sets.

    Args:
        uses: What it is used as.
        source: Its path, or the id of a hub model.
    """
    used = {use.removeprefix("--") for use in uses}
    if used <= _OF_THE_DATA:
        return {}
    reader = next((read for name, read in _MODELS.items() if name in used), _plain_files)
    files = reader(source)
    hashes = content_hashes(files.values(), progress=True)
    if home_expanded(Path(source)).is_file():
        return {"sha256": hashes[next(iter(files.values()))]}
    return {"files": {name: hashes[file] for name, file in files.items()}}


def _plain_files(source: str) -> dict[str, Path]:
    path = home_expanded(Path(source))
    if not path.is_dir():
        return {path.name: path}
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
