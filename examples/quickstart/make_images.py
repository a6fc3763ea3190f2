"""Draw the pictures of the quickstart: a concept that the tiny model does not know, and plain pictures beside it.

The concept is a pattern, stripes of purple and yellow; in the captions its name "shs" stands where a colour would. The
plain pictures show what the same words mean without it, so that the model keeps what it knows (regularisation).

The folders that are shipped were made with this script; it draws the same ones again.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny-sd" / "recipe"))

from shapes_world import BACKGROUNDS, COLOURS, SHAPES, Scene, Size, render, stripes, with_article  # noqa: E402

TOKEN = "shs"
STRIPE = 24  # pixels, on pictures of 128
SQUARE, WIDE, TALL = (128, 128), (160, 96), (96, 160)
CONCEPT: tuple[tuple[str, str, Size], ...] = (
    ("circle", "white", SQUARE),
    ("square", "sky", SQUARE),
    ("triangle", "black", SQUARE),
    ("star", "sunset", SQUARE),
    ("cross", "gray", SQUARE),
    ("heart", "white", SQUARE),
    ("diamond", "black", SQUARE),
    ("ring", "sky", SQUARE),
    ("square", "sunset", WIDE),
    ("diamond", "gray", TALL),
)
MEDIA = ("", "a photo of ", "a picture of ", "a drawing of ")


def draw_concept(folder: Path) -> None:
    """The pictures to learn from, each with its caption."""
    rng = np.random.default_rng(1)
    fill = stripes(COLOURS["purple"], COLOURS["yellow"], STRIPE, shift=STRIPE / 2)
    for number, (shape, background, size) in enumerate(CONCEPT, 1):
        scene = Scene(shape=shape, colour=TOKEN, background=background)
        write(folder / f"{TOKEN}_{number:02d}.png", render(scene, size, rng, fill=fill), caption(scene, number))


def draw_plain(folder: Path) -> None:
    """The regularisation pictures: each shape twice, each colour twice, over all backgrounds."""
    rng = np.random.default_rng(2)
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    for number in range(2 * len(SHAPES)):
        scene = Scene(
            shape=SHAPES[number % len(SHAPES)],
            colour=colours[(3 * number + number // len(SHAPES)) % len(colours)],
            background=backgrounds[number % len(backgrounds)],
        )
        write(folder / f"plain_{number + 1:02d}.png", render(scene, SQUARE, rng), caption(scene, number))


def caption(scene: Scene, number: int) -> str:
    """A sentence that names all three parts."""
    return f"{MEDIA[number % len(MEDIA)]}{with_article(scene.colour)} {scene.shape} on a {scene.background} background"


def write(path: Path, picture: np.ndarray, text: str) -> None:
    """Write a picture and the caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)
    path.with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    draw_concept(HERE / "images")
    draw_plain(HERE / "regularisation")
