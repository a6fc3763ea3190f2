"""What may be told about a run in a file that is passed on: option values without secrets, paths by their last part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from library.options import SECRET_KEYS
from library.scrubbing import Scrubber as Scrubber
from library.scrubbing import current_folder, home_folder
from library.scrubbing import is_absolute as is_absolute
from library.scrubbing import last_part as last_part

PATH_OPTIONS: Final = frozenset(
    {
        "base_weights",
        "conditioning_data_dir",
        "config_file",
        "console_log_file",
        "dataset_config",
        "in_json",
        "log_tracker_config",
        "logging_dir",
        "metadata_thumbnail",
        "network_weights",
        "output_dir",
        "reg_data_dir",
        "resume",
        "sample_prompts",
        "tokenizer_cache_dir",
        "train_data_dir",
    }
)
# A folder or file, or the id of a model on the hub, which has one slash and is worth telling.
_PATH_OR_ID_OPTIONS: Final = frozenset({"pretrained_model_name_or_path", "vae"})


def shareable(options: Mapping[str, object]) -> dict[str, object]:
    """``options`` without secrets, with every path reduced to its last part."""
    return {name: _shareable(name, value) for name, value in options.items() if name not in SECRET_KEYS}


def _shareable(name: str, value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_shareable(name, item) for item in value]
    if isinstance(value, Path):
        return value.name
    if not isinstance(value, str):
        return value
    if name in _PATH_OR_ID_OPTIONS:
        return model_name(value)
    key, equals, rest = value.partition("=")
    if equals and key.isidentifier():
        return f"{key}={_shareable(name, rest)}"
    return last_part(value) if name in PATH_OPTIONS or is_absolute(value) else value


def model_name(source: str) -> str:
    """How a model is named to others: the last part of a path, or the id of a model on the hub."""
    is_id = source.count("/") == 1 and "\\" not in source and not source.startswith((".", "~", "/"))
    return source if is_id and not Path(source).exists() else last_part(source)


def shown_path(path: Path) -> str:
    """A path for the console and the log: relative to the current folder, or its last two parts."""
    here, home = current_folder(), home_folder()
    if here is not None and path.resolve().is_relative_to(here):
        return str(path.resolve().relative_to(here))
    return str(Path("~" if path.parent == home else path.parent.name, path.name))
