"""Write tags for each image of a folder, found by a WD14 tagger.

Usage, from anywhere: ``python finetune/tag_images_by_wd14_tagger.py [options] TRAIN_DATA_DIR``.
"""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from finetune.command_line import read_options  # noqa: E402
from finetune.options import CaptionFileOptions, FolderOptions, WorkOptions  # noqa: E402
from finetune.tagger_labels import Category, Label, Wording, categories, parse_replacements  # noqa: E402
from finetune.tagger_options import OutputOptions, TaggerOptions, TagOptions, ThresholdOptions  # noqa: E402
from finetune.tagger_rules import Chooser  # noqa: E402
from library.errors import Problem, run_script  # noqa: E402
from library.options import did_you_mean  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune.processes import Processes
    from finetune.tag_output import TagOutput
    from finetune.tagger_model import Tagger, TaggerImage

log = logging.getLogger("tag_images")

DESCRIPTION = (
    "Write tags for each image of a folder, found by a WD14 tagger, into a text file beside it or into one metadata "
    "file. The tagger (about 400 MB) is downloaded once. A text file that is there is made anew, unless --append_tags "
    "or --skip_existing is given."
)
TEXT_FILES = CaptionFileOptions(caption_extension=".txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of this tool."""

    folder: FolderOptions
    files: CaptionFileOptions = TEXT_FILES
    tagger: TaggerOptions
    thresholds: ThresholdOptions
    tags: TagOptions
    output: OutputOptions
    work: WorkOptions
    console: ConsoleOptions

    def problems(self) -> list[Problem]:
        """Options that contradict each other."""
        if not (self.output.append_tags and self.work.skip_existing):
            return []
        what = "--append_tags adds to what is there, --skip_existing leaves it alone"
        return [Problem(what, "--append_tags", "Leave one of them out.")]

    def notices(self) -> list[str]:
        """Options without effect."""
        if self.output.output_path is None or self.files == TEXT_FILES:
            return []
        return ["--caption_extension has no effect with --output_path"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the network says of an image: a probability for each label; and the image's displayed size."""

    probabilities: "NDArray[np.float32]"
    size: tuple[int, int]


def main(argv: list[str]) -> int:
    """Tag the images of a folder; returns the exit code."""
    options = read_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    from finetune.image_search import find_images
    from finetune.processes import start_processes
    from finetune.tagger_files import tagger_folder
    from finetune.tagger_model import load_tagger, require_onnxruntime

    require_onnxruntime()
    folder = options.folder
    assert folder.train_data_dir is not None, "asked for with the options"
    found = find_images(folder.train_data_dir, recursive=folder.recursive)
    processes = start_processes()
    output = _output(options, processes)
    images = output.pending(found)
    log.info("%d images to tag", len(images))
    chosen = options.tagger
    if processes.is_main:
        tagger_folder(chosen.repo_id, chosen.model_dir, force=chosen.force_download)
    # The files are there, and every process has listed the same images before the first one writes.
    processes.wait()
    tagger = load_tagger(tagger_folder(chosen.repo_id, chosen.model_dir, force=False), processes)
    return tag(images, found, tagger, output, options, processes)


def tag(
    images: Sequence[Path],
    found: Sequence[Path],
    tagger: "Tagger",
    output: "TagOutput",
    options: Options,
    processes: "Processes",
) -> int:
    """Tag ``images``, of all that were ``found``; returns the exit code."""
    from finetune.image_work import ImageWork, report

    chooser = _chooser(tagger.labels, options)
    counts: Counter[str] = Counter()

    def infer(paths: Sequence[Path], contents: "Sequence[TaggerImage]") -> Sequence[Answer]:
        probabilities = tagger.probabilities(contents)
        return [Answer(row, image.size) for row, image in zip(probabilities, contents, strict=True)]

    def write(path: Path, answer: Answer) -> None:
        # Here and not with the network, which would have to wait for it.
        tags = chooser.choose(answer.probabilities)
        output.write(path, tags, answer.size)
        counts.update(tags)
        if options.work.debug:
            print("\n".join([f"{path}:", *_by_category(chooser, tags)]))

    own = processes.share(images)
    work = ImageWork(
        read=tagger.read,
        infer=infer,
        write=write,
        batch_size=_batch_size(tagger, options.work.batch_size),
        threads=options.work.max_data_loader_n_workers,
    )
    try:
        bad = work.run(own, shows_progress=processes.is_main)
    except BaseException:
        output.keep()
        raise
    output.finish(found, processes)
    if options.output.frequency_tags:
        _show_counts(counts, processes)
    return report(bad, done=len(own) - len(bad), processes=processes)


def _output(options: Options, processes: "Processes") -> "TagOutput":
    from finetune.tag_output import MetadataFile, Separator, TextFiles

    separator, skips = Separator(text=options.tags.caption_separator), options.work.skip_existing
    appends = options.output.append_tags
    if options.output.output_path is None:
        extension = options.files.caption_extension
        return TextFiles(extension=extension, separator=separator, appends=appends, skips_existing=skips)
    path = options.output.output_path
    return MetadataFile(path, separator=separator, appends=appends, skips_existing=skips, processes=processes)


def _chooser(labels: "Sequence[Label]", options: Options) -> Chooser:
    """Chooses tags as the options say; the log tells what cannot have an effect with this tagger."""
    tags = options.tags
    replacements = parse_replacements(tags.tag_replacement or "")
    wording = Wording(
        expands_characters=tags.character_tag_expand,
        removes_underscores=tags.remove_underscore,
        replacements=replacements,
    )
    rules = tags.rules(options.thresholds)
    known = categories(labels)
    for category, place in ((Category.RATING, rules.rating), (Category.QUALITY, rules.quality)):
        if place is not None and category not in known:
            log.warning("this tagger has no %s tags", category.value)
    replaceable = Chooser(labels, replace(wording, replacements={}), rules).vocabulary
    _tell_unknown("--tag_replacement", list(replacements), replaceable)
    chooser = Chooser(labels, wording, rules)
    _tell_unknown("--undesired_tags", sorted(rules.undesired), chooser.vocabulary)
    _tell_unknown("--always_first_tags", rules.first, chooser.vocabulary)
    return chooser


def _tell_unknown(flag: str, tags: Sequence[str], vocabulary: set[str]) -> None:
    for name in tags:
        if name not in vocabulary:
            log.warning("%s: this tagger never gives %r. %s", flag, name, did_you_mean(name, vocabulary))


def _batch_size(tagger: "Tagger", asked: int) -> int:
    if tagger.fixed_batch is None or tagger.fixed_batch == asked:
        return asked
    log.warning("this tagger takes %d images at a time: --batch_size %d is not used", tagger.fixed_batch, asked)
    return tagger.fixed_batch


def _by_category(chooser: Chooser, tags: Sequence[str]) -> list[str]:
    return [f"  {category}: {', '.join(words)}" for category, words in chooser.by_category(tags).items()]


def _show_counts(counts: Counter[str], processes: "Processes") -> None:
    total: Counter[str] = Counter()
    for own in processes.gather([counts]):
        total.update(own)
    if processes.is_main:
        lines = [f"{tag}: {count}" for tag, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
        print("\n".join(["Tag frequencies:", *lines]))


if __name__ == "__main__":
    run_script(main)
