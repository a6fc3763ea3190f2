"""What the model will be shown, as pictures: one HTML page that opens offline, and PNG contact sheets.

The pixels and captions are those that :class:`library.data.dataset.TrainingDataset` makes in training, for the same
keys. Names and captions come from the user's files, so the page's template escapes everything.
"""

import os
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.data.dataset import Batch, TrainingDataset
from library.data.epoch_plan import EpochPlan, MicroBatch
from library.data.images import ImageView, Pixels, decode
from library.data.latent_files import is_latent_file
from library.data.setup import TrainingData
from library.data.spec import Size
from library.files import write_text, written_whole
from library.pages import data_address, page_template
from library.wording import label

_PAGE: Final = Path(__file__).with_name("preview.html")
_EPOCHS: Final = 2
_MOST_PICTURES: Final = 200
"""Pictures of an epoch; the page holds them all, so there is an end to it."""

_PAGE_SIDE: Final = 384
_SOURCE_SIDE: Final = 160
_SHEET_SIDE: Final = 192
_SHEET_FRAME: Final = "#2a6fdb"
_LABEL_HEIGHT: Final = 68
_COLUMNS: Final = 6
_ROWS: Final = 5
_LONGEST_LABEL: Final = 30
_OUTSIDE_MASK: Final = 0.25


class Token(Protocol):
    """One token of a caption."""

    @property
    def text(self) -> str:
        """The part of the caption it stands for."""

    @property
    def starts_word(self) -> bool:
        """Whether it stands behind a space."""

    @property
    def weight(self) -> float:
        """Its weight."""


class CaptionTokens(Protocol):
    """Cuts captions into tokens."""

    @property
    def limit(self) -> int:
        """Number of tokens of a caption that are used."""

    def __call__(self, caption: str) -> Sequence[Token]:
        """All tokens of a caption, those behind the limit too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What was written.

    Attributes:
        page: The HTML page.
        sheets: The contact sheets.
    """

    page: Path
    sheets: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """The whole image with the part of it that is kept.

    Attributes:
        image: The whole image, small.
        box: Left, top, width and height of the part, 0..100 of the whole.
    """

    image: Image.Image
    box: tuple[float, float, float, float]

    @property
    def source(self) -> str:
        """The whole image as a ``data:`` address, for the page."""
        return data_address(self.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One example as the model gets it.

    Attributes:
        name: File name of the image.
        folder: Name of its folder.
        image: The pixels.
        crop: What they were cut from, where anything was cut off.
        facts: What was done to it, in words.
        marks: What was done to it this time and not every time, in a word each.
        caption: The caption as it is trained on.
        written: The caption as the user wrote it; several lines are alternatives.
        used: Its tokens up to the limit.
        lost: Its tokens behind the limit.
        is_reg: A regularisation image.
    """

    name: str
    folder: str
    image: Image.Image
    crop: Crop | None
    facts: tuple[str, ...]
    marks: tuple[str, ...]
    caption: str
    written: str
    used: Sequence[Token]
    lost: Sequence[Token]
    is_reg: bool

    @property
    def source(self) -> str:
        """The picture as a ``data:`` address, for the page."""
        small = self.image.copy()
        small.thumbnail((_PAGE_SIDE, _PAGE_SIDE), Image.Resampling.LANCZOS)
        return data_address(small)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownBatch:
    """A batch of the page.

    Attributes:
        epoch: From 1.
        step: From 1.
        number: Its place in the epoch, from 1.
        bucket: Width and height of its pictures.
        pictures: Its examples.
    """

    epoch: int
    step: int
    number: int
    bucket: tuple[int, int]
    pictures: tuple[Picture, ...]

    @property
    def title(self) -> str:
        """Which it is, and what is in it."""
        regularisation = sum(picture.is_reg for picture in self.pictures)
        train = len(self.pictures) - regularisation
        kinds = f"{train} to train on" + (f", {regularisation} of regularisation" if regularisation else "")
        where = f"epoch {self.epoch}, step {self.step}, batch {self.number}"
        return f"{where}: bucket {self.bucket[0]}x{self.bucket[1]}, {kinds}"


def write_preview(
    folder: Path, data: TrainingData, plan: EpochPlan, *, tokens_of: CaptionTokens, seed: int, total_steps: int
) -> Preview:
    """Write the page ``index.html`` and the contact sheets to ``folder``, in place of those of an earlier time.

    Args:
        folder: Where they go.
        data: The training set.
        plan: The order of training.
        tokens_of: Cuts captions into tokens.
        seed: Seed of the run.
        total_steps: Steps of the run.

    Raises:
        UserError: An image cannot be read, or the folder cannot be written to.
    """
    dataset = TrainingDataset(data=data, seed=seed, total_steps=total_steps, tokenize=_no_tokens)
    batches: list[ShownBatch] = []
    notes: list[str] = []
    for epoch in range(1, min(_EPOCHS, -(-total_steps // plan.steps_per_epoch)) + 1):
        keys = list(_keys(plan, epoch, total_steps))
        shown = list(_limited(keys))
        batches += [_shown(dataset[key], number, dataset, tokens_of) for number, key in enumerate(shown, 1)]
        if len(shown) < len(keys):
            notes.append(f"Epoch {epoch} has {len(keys)} batches; the first {len(shown)} are shown.")
    for earlier in folder.glob("epoch-*-sheet-*.png"):
        earlier.unlink()
    sheets = tuple(_write_sheets(folder, batches))
    page = folder / "index.html"
    write_text(page, page_template(_PAGE).render(batches=batches, notes=notes, limit=tokens_of.limit, seed=seed))
    return Preview(page=page, sheets=sheets)


def _no_tokens(_: str) -> tuple[Tensor, Tensor | None]:
    """Stands in for the model's tokenizer, whose numbers nobody looks at here."""
    return torch.zeros(1, 77, dtype=torch.int64), None


def _keys(plan: EpochPlan, epoch: int, total_steps: int) -> Iterator[MicroBatch]:
    """The batches of an epoch over all processes, as far as the run goes."""
    for step in plan.epoch(epoch):
        yield from (key for key in step.micro_batches if key.step < total_steps)


def _limited(keys: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
    """The first batches, with as many pictures as are shown; at least one batch."""
    pictures = 0
    for key in keys:
        if pictures and pictures + len(key.examples) > _MOST_PICTURES:
            return
        pictures += len(key.examples)
        yield key


def _shown(batch: Batch, number: int, dataset: TrainingDataset, tokens_of: CaptionTokens) -> ShownBatch:
    assert batch.pixels is not None, "made without a cache"
    pixels = batch.pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    masks = [None] * len(batch.examples) if batch.mask is None else list(batch.mask.numpy())
    height, width = pixels.shape[1:3]
    return ShownBatch(
        epoch=batch.epoch,
        step=batch.step + 1,
        number=number,
        bucket=(width, height),
        pictures=tuple(
            _picture(dataset, batch.epoch, example, array, mask, caption, tokens_of)
            for example, array, mask, caption in zip(batch.examples, pixels, masks, batch.captions, strict=True)
        ),
    )


def _picture(
    dataset: TrainingDataset,
    epoch: int,
    example: int,
    pixels: Pixels,
    mask: NDArray[np.float32] | None,
    caption: str,
    tokens_of: CaptionTokens,
) -> Picture:
    """An example with all that is told of it; ``pixels`` (H, W, 3), ``mask`` (H, W) in 0..1."""
    record = dataset.data.records[dataset.data.examples[example]]
    view, origin = dataset.framed(epoch, example)
    tokens = tokens_of(caption)
    lost = tokens[tokens_of.limit :]
    facts = [
        *_framing(view, origin),
        f"{record.repeats} repeats in an epoch" if record.repeats > 1 else "once in an epoch",
        f"{len(tokens) - len(lost)} of {tokens_of.limit} tokens" + (f", {len(lost)} too many" if lost else ""),
    ]
    marks = ["mirrored"] if dataset.is_flipped(epoch, example) else []
    if mask is not None and mask.min() < 1:
        marks.append(f"the mask keeps {mask.mean():.0%}")
        # Darkened where it does not count, but still to be seen.
        pixels = (pixels * (_OUTSIDE_MASK + (1 - _OUTSIDE_MASK) * mask[..., None])).round().astype("uint8")
    return Picture(
        name=record.path.name,
        folder=record.path.parent.name,
        image=Image.fromarray(pixels),
        crop=_crop(view, origin),
        facts=tuple(facts),
        marks=tuple(marks),
        caption=caption,
        written=record.caption,
        used=tokens[: tokens_of.limit],
        lost=lost,
        is_reg=record.is_reg,
    )


def _framing(view: ImageView, origin: Size) -> Iterator[str]:
    """How the image became as large as its bucket, in words."""
    placement = view.placement
    size = f"{view.size[0]}x{view.size[1]}"
    resized = f"{placement.resized[0]}x{placement.resized[1]}"
    yield f"{size}, resized to {resized}" if placement.resized != view.size else f"{size}, not resized"
    if placement.resized == placement.bucket:
        yield "nothing cut off"
    else:
        yield f"cropped at {origin[0]}, {origin[1]}: {placement.crop_loss:.1%} cut off"


def _crop(view: ImageView, origin: Size) -> Crop | None:
    """The whole image and the part of it that is kept; None where that is all of it."""
    placement = view.placement
    if placement.resized == placement.bucket or is_latent_file(view.path):
        return None
    whole = Image.fromarray(decode(view.path).rgb)
    whole.thumbnail((_SOURCE_SIDE, _SOURCE_SIDE), Image.Resampling.LANCZOS)
    left, top, width, height = (
        round(100 * length / placement.resized[at % 2], 2) for at, length in enumerate((*origin, *placement.bucket))
    )
    return Crop(image=whole, box=(left, top, width, height))


# --- the page


def open_in_browser(page: Path) -> bool:
    """Open ``page`` if somebody sits before a screen; whether it was tried."""
    has_screen = sys.platform in ("win32", "darwin") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not has_screen or not sys.stdin.isatty():
        return False
    return webbrowser.open(page.resolve().as_uri())


# --- the contact sheets


def _write_sheets(folder: Path, batches: Sequence[ShownBatch]) -> Iterator[Path]:
    """One sheet for some thirty pictures of an epoch, in the order of training."""
    for epoch in dict.fromkeys(batch.epoch for batch in batches):
        cells = iter([(batch, picture) for batch in batches if batch.epoch == epoch for picture in batch.pictures])
        number = 1
        while page := list(islice(cells, _COLUMNS * _ROWS)):
            path = folder / f"epoch-{epoch:02d}-sheet-{number:03d}.png"
            with written_whole(path) as temporary:
                _sheet(page).save(temporary, format="PNG")
            yield path
            number += 1


def _sheet(cells: Sequence[tuple[ShownBatch, Picture]]) -> Image.Image:
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    height = _SHEET_SIDE + _LABEL_HEIGHT
    sheet = Image.new("RGB", (columns * _SHEET_SIDE, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for position, (batch, picture) in enumerate(cells):
        left, top = position % columns * _SHEET_SIDE, position // columns * height
        scale = (_SHEET_SIDE - 8) / max(picture.image.size)
        small = picture.image.resize(
            (max(1, round(picture.image.width * scale)), max(1, round(picture.image.height * scale))),
            Image.Resampling.LANCZOS,
        )
        at = (left + (_SHEET_SIDE - small.width) // 2, top + (_SHEET_SIDE - small.height) // 2)
        if picture.is_reg:
            draw.rectangle((at[0] - 3, at[1] - 3, at[0] + small.width + 2, at[1] + small.height + 2), _SHEET_FRAME)
        sheet.paste(small, at)
        # The epoch is in the file's name.
        lines = (
            f"step {batch.step}, batch {batch.number}, {batch.bucket[0]}x{batch.bucket[1]}",
            picture.name,
            ", ".join([*(["regularisation"] if picture.is_reg else []), *picture.marks]),
            picture.caption or "(no caption)",
        )
        for line, text in enumerate(line for line in lines if line):
            draw.text((left + 4, top + _SHEET_SIDE + 16 * line), label(text, _LONGEST_LABEL), fill="black", font=font)
    return sheet
