"""Options that the tools share. Imports nothing heavy."""

from dataclasses import dataclass, replace
from pathlib import Path

from library.data.folders import IMAGE_SUFFIXES
from library.data.options import caption_suffix
from library.errors import Problem
from library.option_positions import missing_positions
from library.options import option


def _not_empty(text: str) -> str | None:
    return None if text.strip() else "must not be empty"


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderOptions:
    """Images."""

    train_data_dir: Path | None = option(
        None, metavar="DIR", help="Folder of the images; may be given without the flag, as the first word."
    )
    recursive: bool = option(False, help="Take the images of the folders inside it as well.")

    def problems(self) -> list[Problem]:
        """A folder that is not given."""
        return missing_positions({"train_data_dir": self.train_data_dir})


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkOptions:
    """Work."""

    batch_size: int = option(
        1, minimum=1, metavar="N", help="Images the model sees at a time: more is faster and takes more memory."
    )
    max_data_loader_n_workers: int | None = option(
        None,
        minimum=0,
        metavar="N",
        help="Threads that read images ahead of the model: one a core when absent, none (read in between) with 0.",
    )
    skip_existing: bool = option(
        False,
        help="Leave out images that have their text already, for instance after a stop; without it, it is made anew.",
    )
    debug: bool = option(False, help="Show the result of every image.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionFileOptions:
    """Text files."""

    caption_extension: str = option(
        ".caption",
        metavar="EXT",
        check=_not_empty,
        help="Suffix of the text file that is written beside each image.",
    )
    caption_extention: str | None = option(
        None, metavar="EXT", help="Old, misspelt name of --caption_extension; wins when given."
    )

    def settled(self) -> "CaptionFileOptions":
        """The same, with one suffix that starts with a dot."""
        extension = caption_suffix(self.caption_extension, self.caption_extention)
        return replace(self, caption_extension=extension, caption_extention=None)

    def problems(self) -> list[Problem]:
        """A suffix that would overwrite images."""
        chosen = self.caption_extention or self.caption_extension
        if f".{chosen.lstrip('.').lower()}" not in IMAGE_SUFFIXES:
            return []
        flag = "--caption_extention" if self.caption_extention else "--caption_extension"
        return [Problem(f"{flag} {chosen} would overwrite the images", flag, "Use .caption or .txt.")]
