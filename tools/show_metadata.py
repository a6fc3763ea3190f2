"""Print what a model file says about itself.

Usage, from anywhere: ``python tools/show_metadata.py --model FILE``. Only the file's header is read.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.documents import read_table  # noqa: E402
from library.errors import Problem, UserError, run_script  # noqa: E402
from library.files import read_metadata  # noqa: E402
from library.models.formats import METADATA_FILE  # noqa: E402
from library.option_positions import name_positions, split_positions  # noqa: E402
from library.options import near_remedy, option, parse_options  # noqa: E402

DESCRIPTION = "Print the metadata of a .safetensors file, or of a model folder made by training, as sorted JSON."


@dataclass(frozen=True, kw_only=True, slots=True)
class FileOptions:
    """Model."""

    model: Path | None = option(
        None, metavar="FILE", help="A .safetensors file, or a Diffusers folder that training wrote."
    )

    def problems(self) -> list[Problem]:
        """What is missing."""
        if self.model is not None:
            return []
        return [Problem("no model is given", "--model", "Write --model FILE.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    file: FileOptions


def main(argv: list[str]) -> int:
    """Print the metadata; returns the exit code."""
    words, rest = split_positions(Options, argv)
    given = [*name_positions(words, ["model"]), *rest]
    options = parse_options(Options, given, prog=Path(__file__).name, description=DESCRIPTION)
    assert options.file.model is not None, "asked for with the options"
    print(json.dumps(_metadata(options.file.model), indent=4, sort_keys=True))
    return 0


def _metadata(path: Path) -> dict[str, str]:
    if not path.exists():
        raise UserError(f"file not found: {path}", where="--model", remedy=near_remedy(path))
    if path.is_dir():
        return _of_folder(path)
    if path.suffix.lower() != ".safetensors":
        raise UserError(
            f"{path.name} has no metadata: only .safetensors files have a place for it",
            where=f"--model {path}",
            remedy="Give the .safetensors file of the model, if there is one.",
        )
    return read_metadata(path)


def _of_folder(folder: Path) -> dict[str, str]:
    try:
        content: dict[str, str] = read_table(folder / METADATA_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"the folder has no {METADATA_FILE}, which training writes",
            where=f"--model {folder}",
            remedy="Give a .safetensors file, or a folder that training wrote.",
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{METADATA_FILE} cannot be read: {error}", where=f"--model {folder}", remedy="The file is damaged."
        ) from error
    return content


if __name__ == "__main__":
    run_script(main)
