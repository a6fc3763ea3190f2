"""One picture of all previews: a row for each prompt, a column for each time. So progress is seen at a glance."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.training.prompt_files import PreviewPrompt
from library.wording import label

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_COLUMNS: Final = 16
MOST_ROWS: Final = 12
SIDE: Final = 192  # pixels of the longer side of a picture
_GAP: Final = 6  # pixels
_HEAD: Final = 22  # pixels above the pictures, for the steps
_LABEL: Final = 20  # pixels above each row, for its prompt
_LETTER: Final = 7  # pixels that a letter takes, about

_OCCASION: Final = re.compile(r"(?:e\d{6}|\d{6,})_(\d{2,})_\d{14}(?:_\d+)?\.png")


class PreviewGrid:
    """Small copies of the previews of a run, by prompt and time.

    Only so many are kept: of more times than :data:`MOST_COLUMNS`, those go that leave the smallest gaps, but never the
    first and the newest; prompts behind :data:`MOST_ROWS` are left out.

    Args:
        prompts: The prompts, in order.
    """

    def __init__(self, prompts: Sequence[PreviewPrompt]) -> None:
        self.prompts = tuple(prompts[:MOST_ROWS])
        self._columns: dict[int, dict[int, Image]] = {}

    @property
    def steps(self) -> tuple[int, ...]:
        """The times there are previews of, in finished steps."""
        return tuple(sorted(self._columns))

    def at(self, row: int, step: int) -> "Image | None":
        """The small preview of the prompt at position ``row``, if there is one."""
        return self._columns[step].get(row)

    def add(self, row: int, image: "Image", step: int) -> None:
        """Take in the preview of the prompt at position ``row``, made after ``step`` steps."""
        if row >= len(self.prompts):
            return
        if step not in self._columns and len(self._columns) >= MOST_COLUMNS:
            self._thin_out()
        self._columns.setdefault(step, {})[row] = _small(image)

    def add_files(self, folder: Path, prefix: str, *, up_to: int) -> None:
        """Take in the previews that an earlier part of the run has left in ``folder``.

        Args:
            folder: Their folder.
            prefix: What their names begin with.
            up_to: Steps that the earlier part has done.
        """
        for row, path in _preview_files(folder, prefix):
            # Whatever else lies there is no preview of this run.
            with contextlib.suppress(OSError, ValueError, SyntaxError):
                self._add_file(row, path, up_to)

    def _add_file(self, row: int, path: Path, up_to: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            # Texts may stand behind the pixels of a PNG.
            image.load()
            step = int(image.info.get("step", up_to + 1))
            is_ours = row < len(self.prompts) and image.info.get("prompt") == self.prompts[row].prompt
            if is_ours and step <= up_to:
                self.add(row, image, step)

    def _thin_out(self) -> None:
        """Drop the column that leaves the smallest gap, which may be the last: a newer one is about to come."""
        steps = self.steps
        nexts = [*steps[2:], 2 * steps[-1] - steps[-2]]
        gaps = [(later - before, step) for before, step, later in zip(steps, steps[1:], nexts, strict=False)]
        del self._columns[min(gaps)[1]]

    def picture(self) -> "Image":
        """The grid; there is at least one preview."""
        from PIL import Image, ImageDraw, ImageFont

        cells = [image for column in self._columns.values() for image in column.values()]
        width, height = max(image.width for image in cells), max(image.height for image in cells)
        rows = range(len(self.prompts))
        size = (
            _GAP + len(self._columns) * (width + _GAP),
            _HEAD + len(rows) * (_LABEL + height + _GAP),
        )
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(13)
        for column, step in enumerate(self.steps):
            draw.text((_GAP + column * (width + _GAP), 4), f"step {step}", fill="#555555", font=font)
        for row in rows:
            top = _HEAD + row * (_LABEL + height + _GAP)
            prompt = label(self.prompts[row].prompt, (size[0] - 2 * _GAP) // _LETTER)
            draw.text((_GAP, top), prompt, fill="black", font=font)
            for column, step in enumerate(self.steps):
                image = self.at(row, step)
                if image is not None:
                    sheet.paste(image, (_GAP + column * (width + _GAP), top + _LABEL))
        return sheet


def _preview_files(folder: Path, prefix: str) -> Iterator[tuple[int, Path]]:
    """Files named as previews are, with the positions of their prompts, oldest first."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(prefix):
            continue
        match = _OCCASION.fullmatch(path.name.removeprefix(prefix))
        if match:
            yield int(match[1]), path


def _small(image: "Image") -> "Image":
    from PIL import Image

    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small
