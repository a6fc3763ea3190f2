"""Write a caption for each image of a folder, made by BLIP.

Usage, from anywhere: ``python finetune/make_captions.py [options] TRAIN_DATA_DIR``.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from finetune.command_line import read_options  # noqa: E402
from finetune.options import CaptionFileOptions, FolderOptions, WorkOptions  # noqa: E402
from library.errors import Problem, run_script  # noqa: E402
from library.options import option  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402

if TYPE_CHECKING:
    import torch

    from finetune.blip import Search

log = logging.getLogger("make_captions")

DESCRIPTION = (
    "Write a caption for each image of a folder, made by BLIP, into a text file beside it. Without --caption_weights "
    "BLIP's large captioning model (about 1.8 GB) and BERT's vocabulary are downloaded, once. A text file that is "
    "there is made anew, unless --skip_existing is given."
)
LARGE = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlipOptions:
    """BLIP."""

    caption_weights: str = option(
        LARGE,
        metavar="PATH",
        help="The model: BLIP's own checkpoint as a file or an address (http), or a folder or hub id with a model of "
        "transformers, such as Salesforce/blip-image-captioning-large.",
    )
    beam_search: bool = option(False, help="Search for the likeliest caption instead of drawing one (nucleus).")
    num_beams: int = option(1, minimum=1, metavar="N", help="Captions kept in a beam search at a time; 1 is greedy.")
    top_p: float = option(
        0.9, above=0, maximum=1, metavar="P", help="Draw from the likeliest words that hold this probability together."
    )
    max_length: int = option(75, minimum=6, metavar="N", help="Longest caption, in tokens; 4 are the hidden prompt.")
    min_length: int = option(5, minimum=0, metavar="N", help="Shortest caption, in tokens; 4 are the hidden prompt.")
    seed: int = option(
        42,
        minimum=0,
        maximum=2**32 - 1,
        metavar="N",
        help="Seed of the draws; each image has its own, so neither the batch size nor other images change a caption.",
    )

    def problems(self) -> list[Problem]:
        """Lengths that contradict each other."""
        if self.min_length <= self.max_length:
            return []
        what = f"--min_length {self.min_length} is more than --max_length {self.max_length}"
        return [Problem(what, "--min_length", "Make it smaller.")]

    def notices(self) -> list[str]:
        """Options without effect."""
        found = []
        if self.num_beams > 1 and not self.beam_search:
            found.append("--num_beams has no effect without --beam_search")
        if self.beam_search and self.top_p != BlipOptions().top_p:
            found.append("--top_p has no effect with --beam_search")
        return found

    def search(self) -> "Search":
        """How captions are searched for."""
        from finetune.blip import Search

        return Search(
            beams=self.num_beams if self.beam_search else None,
            top_p=self.top_p,
            min_length=self.min_length,
            max_length=self.max_length,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of this tool."""

    folder: FolderOptions
    files: CaptionFileOptions
    blip: BlipOptions
    work: WorkOptions
    console: ConsoleOptions


def main(argv: list[str]) -> int:
    """Caption the images of a folder; returns the exit code."""
    options = read_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)

    from finetune.captioning import Captioner, caption_folder

    def load(device: "torch.device") -> Captioner:
        from finetune.blip import check_length, load_blip

        blip, search = load_blip(options.blip.caption_weights, device), options.blip.search()
        check_length(blip, search)
        return Captioner(read=blip.read, caption=lambda names, images: blip.caption(names, images, search))

    return caption_folder(options.folder, options.files, options.work, load)


if __name__ == "__main__":
    run_script(main)
