"""A captioning model over a folder of images: what the captioning tools share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finetune.caption_files import text_file, to_write
from finetune.image_search import find_images
from finetune.image_work import ImageWork, report
from finetune.options import CaptionFileOptions, FolderOptions, WorkOptions
from finetune.processes import Processes, start_torch
from library.files import write_text

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioner:
    """A model that describes images.

    Attributes:
        read: From an image file to what the model takes.
        caption: From the names of a batch of images, and what ``read`` gave for them, to a caption each.
    """

    read: Callable[[Path], Any]
    caption: Callable[[Sequence[str], Sequence[Any]], Sequence[str]]


Load: TypeAlias = Callable[["torch.device"], Captioner]
"""Loads the model to a device."""


def caption_folder(folder: FolderOptions, files: CaptionFileOptions, work: WorkOptions, load: Load) -> int:
    """Write a caption for each image of a folder; returns the exit code.

    Raises:
        UserError: There are no images, the model cannot be used, or a file cannot be written.
    """
    root, extension = folder.train_data_dir, files.caption_extension
    assert root is not None, "asked for with the options"
    found = find_images(root, recursive=folder.recursive)
    images = to_write(found, extension, skip_existing=work.skip_existing)
    log.info("%d images to caption", len(images))
    if not images:
        return 0
    runtime = start_torch()
    processes = Processes.of(runtime)
    # One process downloads, the others find the files there.
    with runtime.accelerator.main_process_first():
        captioner = load(runtime.device)
    # Every process has listed the same images before the first one writes.
    processes.wait()

    def infer(paths: Sequence[Path], contents: Sequence[Any]) -> Sequence[str]:
        return captioner.caption([path.relative_to(root).as_posix() for path in paths], contents)

    def write(path: Path, caption: str) -> None:
        write_text(text_file(path, extension), f"{caption}\n")
        if work.debug:
            print(f"{path}: {caption}")

    own = processes.share(images)
    bad = ImageWork(
        read=captioner.read,
        infer=infer,
        write=write,
        batch_size=work.batch_size,
        threads=work.max_data_loader_n_workers,
    ).run(own, shows_progress=processes.is_main)
    return report(bad, done=len(own) - len(bad), processes=processes)
