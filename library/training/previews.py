"""The hook that makes preview images: when they are due, their names, and their parameters inside the PNG."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import written_whole
from library.randomness import key
from library.training.clock import now, stamp
from library.training.options import PreviewOptions
from library.training.preview_grid import PreviewGrid
from library.training.privacy import shown_path
from library.training.prompt_files import PreviewPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.training.progress import Moment, RunLength

logger = logging.getLogger(__name__)

Generate = Callable[[PreviewPrompt], "Image"]
Show = Callable[[PreviewPrompt, "Image", int], None]
"""A prompt, its image and the number of finished steps."""


def preview_place(output_dir: Path, output_name: str | None) -> tuple[Path, str]:
    """The folder of a run's images, and what their names begin with."""
    return output_dir / "sample", f"{output_name}_" if output_name else ""


class Previews:
    """The hook that makes preview images.

    Args:
        options: When images are made.
        prompts: What they show.
        generate: Makes one image; the prompt it gets always has a seed.
        output_dir: Images go to the folder ``sample`` below it.
        output_name: Put before the names of the images.
        seed: Seed of the run: an image without a seed of its own gets one from it, the same every time.
        is_main: Only the main process makes images.
        show: Told every image.
        continued_at: Steps done by an earlier part of the run, whose images belong into the grid, too.
    """

    def __init__(
        self,
        options: PreviewOptions,
        prompts: Sequence[PreviewPrompt],
        generate: Generate,
        *,
        output_dir: Path,
        output_name: str | None,
        seed: int,
        is_main: bool = True,
        show: Show = lambda prompt, image, step: None,
        continued_at: int = 0,
    ) -> None:
        self._options = options.settled()
        self._prompts = prompts
        self._generate = generate
        self._folder, self._prefix = preview_place(output_dir, output_name)
        self._seed = seed
        self._is_main = is_main
        self._show = show
        self._continued_at = continued_at
        self._grid = PreviewGrid(prompts)
        if prompts and continued_at and is_main:
            self._grid.add_files(self._folder, self._prefix, up_to=continued_at)
        self.written: list[Path] = []

    def before_training(self, length: "RunLength") -> None:
        """Make the images that are asked for before the first step: of the untrained model, or those that are missing.

        A run that was stopped, or killed, at a step with previews has not made them.
        """
        step = self._continued_at
        if step == 0:
            occasion = "e000000" if self._options.sample_at_first else None
        else:
            ended = step % length.steps_per_epoch == 0
            occasion = self._occasion(step, epoch=length.epoch_of(step - 1), epoch_ended=ended)
        if occasion is not None and not (step and any(self._folder.glob(f"{escape(self._prefix)}{occasion}_*.png"))):
            self.make(occasion, step=step)

    def __call__(self, moment: "Moment") -> None:
        """Make the images that are due at ``moment``."""
        # Whoever stops a run waits for it.
        occasion = self._occasion(moment.step, epoch=moment.epoch, epoch_ended=moment.epoch_ended)
        if occasion is not None and not moment.interrupted:
            self.make(occasion, step=moment.step)

    def _occasion(self, step: int, *, epoch: int, epoch_ended: bool) -> str | None:
        """What images after ``step`` steps are called; None where none are due. Epochs win over steps."""
        epochs, steps = self._options.sample_every_n_epochs, self._options.sample_every_n_steps
        if epochs:
            return f"e{epoch:06d}" if epoch_ended and epoch % epochs == 0 else None
        return f"{step:06d}" if steps and step % steps == 0 else None

    def make(self, occasion: str, *, step: int) -> None:
        """Make one image for each prompt; a prompt that fails is logged, and the others are made."""
        if not self._is_main:
            return
        for index, prompt in enumerate(self._prompts):
            seed = f"_{prompt.seed}" if prompt.seed is not None else ""
            path = self._folder / f"{self._prefix}{occasion}_{index:02d}_{stamp(now())}{seed}.png"
            try:
                self._make_one(path, prompt, index, step)
            except Exception as error:
                logger.error("the preview of prompt %d failed: %s", index + 1, error)
                logger.debug("preview failed", exc_info=True)
        self._write_grid()

    def _make_one(self, path: Path, prompt: PreviewPrompt, index: int, step: int) -> None:
        if prompt.seed is None:
            prompt = replace(prompt, seed=key(self._seed, "preview", index))
        image = self._generate(prompt)
        self._grid.add(index, image, step)
        self._show(prompt, image, step)
        write_png(path, image, {**_parameters(prompt), "step": str(step)})
        self.written.append(path)
        logger.info("preview: %s", shown_path(path))

    def _write_grid(self) -> None:
        """Replace the picture of all previews over time, once there are several times."""
        if len(self._grid.steps) < 2:
            return
        try:
            write_png(self._folder / f"{self._prefix}grid.png", self._grid.picture(), {})
        except Exception as error:
            logger.error("the grid of the previews failed: %s", error)
            logger.debug("grid failed", exc_info=True)


def _parameters(prompt: PreviewPrompt) -> dict[str, str]:
    """What it takes to make the image again, as PNG text."""
    return {
        "prompt": prompt.prompt,
        "negative-prompt": prompt.negative_prompt,
        "seed": str(prompt.seed),
        "sampler": prompt.sampler,
        "steps": str(prompt.steps),
        "scale": str(prompt.scale),
        "size": f"{prompt.width}x{prompt.height}",
    }


def write_png(path: Path, image: "Image", text: dict[str, str]) -> None:
    """Write ``image`` as PNG with ``text`` inside, whole or not at all.

    Raises:
        UserError: The folder cannot be written to.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
