"""What may be told about a run in a file that is passed on: option values without secrets, paths by their last part."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from library.options import SECRET_KEYS

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


def last_part(path: str) -> str:
    """The last part of a path, whichever system wrote it."""
    return PureWindowsPath(path).name or PurePosixPath(path).name


def is_absolute(text: str) -> bool:
    """Whether ``text`` is an absolute path of any system, or one below a home folder."""
    return text.startswith("~") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


# Every absolute path of two parts or more that has no blanks; "https://..." and fractions are none.
_POSIX_PATH: Final = re.compile(r"(?<![\w.:/~])~?/[^\s/'\"<>|:,;()]+(?:/[^\s/'\"<>|:,;()]*)+|~/[^\s/'\"<>|:,;()]+")
_WINDOWS_PATH: Final = re.compile(r"(?<!\w)(?:[A-Za-z]:[\\/]|\\\\)[^\s\\/'\"<>|:]+(?:[\\/][^\s\\/'\"<>|:]*)*")


class Scrubber:
    """Makes free text fit to be passed on: paths become their last part, secrets three stars.

    Args:
        paths: Paths that may occur; needed for those with blanks in them.
        secrets: Texts that must not be told.
    """

    def __init__(self, paths: Iterable[Path | str] = (), secrets: Iterable[str] = ()) -> None:
        known = {str(path) for path in paths} | {str(Path(path).absolute()) for path in paths}
        # The longest first: one may begin with another.
        self._paths = sorted((path for path in known if is_absolute(path)), key=len, reverse=True)
        self._secrets = [secret for secret in secrets if secret]

    def __call__(self, text: str) -> str:
        """``text`` without paths and secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for folder, name in _own_folders():
            if folder != folder.parent:
                text = text.replace(f"{folder}/", name).replace(f"{folder}\\", name)
        for path in self._paths:
            text = text.replace(path, last_part(path))
        for pattern in (_WINDOWS_PATH, _POSIX_PATH):
            text = pattern.sub(lambda match: last_part(match[0]), text)
        return text


def _own_folders() -> Iterator[tuple[Path, str]]:
    """The current and the home folder, as far as there are such, and what stands for them."""
    with suppress(OSError):
        yield Path.cwd(), ""
    with suppress(RuntimeError):
        yield Path.home(), "~/"


def shown_path(path: Path) -> str:
    """A path for the console and the log: relative to the current folder, or its last two parts."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(Path(path.parent.name, path.name))
