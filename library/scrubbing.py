"""Takes paths and secrets out of text that others may see."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final


def last_part(path: str) -> str:
    """The last part of a path, whichever system wrote it."""
    return PureWindowsPath(path).name or PurePosixPath(path).name


def is_absolute(text: str) -> bool:
    """Whether ``text`` is an absolute path of any system, or one below a home folder."""
    return text.startswith("~") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def home_folder() -> Path | None:
    """The user's home; None for a user who has none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def current_folder() -> Path | None:
    """The current folder, if what is relative to it says nothing of a user: not where it holds the home, or is gone."""
    home = home_folder()
    try:
        here = Path.cwd()
    except OSError:
        return None
    return None if here == here.parent or (home is not None and here in home.parents) else here


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
        for folder, name in ((current_folder(), ""), (home_folder(), "~/")):
            if folder is not None:
                text = text.replace(f"{folder}/", name).replace(f"{folder}\\", name)
        for path in self._paths:
            text = text.replace(path, last_part(path))
        for pattern in (_WINDOWS_PATH, _POSIX_PATH):
            text = pattern.sub(lambda match: last_part(match[0]), text)
        return text
