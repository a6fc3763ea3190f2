"""Lay the first and the last previews of a run side by side in one picture.

    python examples/quickstart/before_after.py outputs/quickstart

A run with ``--sample_at_first`` has previews of step 0. The sheet has a column for each prompt: above what the model
made of it before training, below what it made of it at the last step that has previews.
"""

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GAP = 8  # pixels
LABEL_WIDTH = 56
LINE_HEIGHT = 14
CAPTION_LINES = 2
ENLARGED = 160  # pixels a side at least, so that small previews can be seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """One preview, with what its file says about it."""

    path: Path
    prompt: str
    step: int


def read_previews(folder: Path) -> list[Preview]:
    """The previews in ``folder``, oldest first, as far as they say what they show."""
    previews = []
    for path in sorted(folder.glob("*.png"), key=lambda file: file.stat().st_mtime):
        with Image.open(path) as image:
            text = image.info
        if "step" in text and "prompt" in text:
            previews.append(Preview(path=path, prompt=f"{text['prompt']} ({text.get('seed')})", step=int(text["step"])))
    return previews


def pair_up(previews: list[Preview]) -> dict[str, tuple[Preview, Preview]]:
    """For each prompt its newest preview of step 0 and its newest of the last step; left out where one is missing."""
    before = {preview.prompt: preview for preview in previews if preview.step == 0}
    last = max((preview.step for preview in previews), default=0)
    after = {preview.prompt: preview for preview in previews if preview.step == last and last > 0}
    return {prompt: (before[prompt], after[prompt]) for prompt in before if prompt in after}


def compose(pairs: dict[str, tuple[Preview, Preview]]) -> Image.Image:
    """The sheet: prompts above, then the row before and the row after."""
    columns = [[_enlarged(preview.path) for preview in pair] for pair in pairs.values()]
    width = max(image.width for column in columns for image in column)
    height = max(image.height for column in columns for image in column)
    top = CAPTION_LINES * LINE_HEIGHT + 2 * GAP
    size = (LABEL_WIDTH + len(columns) * (width + GAP) + GAP, top + 2 * (height + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for row, label in enumerate(("before", "after")):
        draw.text((GAP, top + row * (height + GAP) + height // 2), label, fill="black", font=font)
    for number, (prompt, column) in enumerate(zip(pairs, columns, strict=True)):
        left = LABEL_WIDTH + number * (width + GAP)
        lines = textwrap.wrap(prompt.rpartition(" (")[0], width // 6)[:CAPTION_LINES]
        draw.multiline_text((left, GAP), "\n".join(lines), fill="black", font=font, spacing=2)
        for row, image in enumerate(column):
            sheet.paste(image, (left, top + row * (height + GAP)))
    return sheet


def _enlarged(path: Path) -> Image.Image:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    factor = -(-ENLARGED // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def main(argv: list[str]) -> int:
    """Write ``before_after.png`` into the output folder of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="--output_dir of the run")
    folder = parser.parse_args(argv).output_dir
    pairs = pair_up(read_previews(folder / "sample"))
    if not pairs:
        print(f"no previews of step 0 and of a later step in {folder / 'sample'}", file=sys.stderr)
        return 2
    compose(pairs).save(folder / "before_after.png")
    print(f"before and after: {folder / 'before_after.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
