"""Write a caption for each image of a folder, made by GIT.

Usage, from anywhere: ``python finetune/make_captions_by_git.py [options] TRAIN_DATA_DIR``.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from finetune.command_line import read_options  # noqa: E402
from finetune.options import CaptionFileOptions, FolderOptions, WorkOptions  # noqa: E402
from library.errors import run_script  # noqa: E402
from library.options import option  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402

if TYPE_CHECKING:
    import torch

DESCRIPTION = (
    "Write a caption for each image of a folder, made by GIT, into a text file beside it. Without --model_id the model "
    "microsoft/git-large-textcaps (about 1.6 GB) is downloaded, once. A text file that is there is made anew, unless "
    "--skip_existing is given."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GitOptions:
    """GIT."""

    model_id: str = option(
        "microsoft/git-large-textcaps", metavar="PATH", help="The model: a hub id, or a folder that holds one."
    )
    max_length: int = option(50, minimum=2, metavar="N", help="Longest caption, in tokens.")
    remove_words: bool = option(
        False, help='Leave out phrases about text that is seen in the image ("with the words ...").'
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of this tool."""

    folder: FolderOptions
    files: CaptionFileOptions
    git: GitOptions
    work: WorkOptions
    console: ConsoleOptions


def main(argv: list[str]) -> int:
    """Caption the images of a folder; returns the exit code."""
    options = read_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    from finetune.captioning import Captioner, caption_folder

    def load(device: "torch.device") -> Captioner:
        from finetune.git_captions import load_git

        git, chosen = load_git(options.git.model_id, device), options.git
        return Captioner(
            read=git.read,
            caption=lambda _, images: git.caption(
                images, max_length=chosen.max_length, removes_words=chosen.remove_words
            ),
        )

    return caption_folder(options.folder, options.files, options.work, load)


if __name__ == "__main__":
    run_script(main)
